"""Access control for mosquitto, generated: each device reaches its own topics alone, by the name it logged in with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from device_agents.homeassistant import PREFIX, STATUS_TOPIC, discovery_topic
from device_agents.settings import NAME, AgentSettings, MqttSettings
from device_agents.topics import CONTROLLER, GROUP
from edge_adapt.errors import ConfigError

WRITTEN = ("state", "birth", "reported", "tele/#", "event/#", "alert/#", "ack/#")
READ = ("desired", "birth", "cmd/#", "xfer/#")
ORDERED = ("desired", "cmd/#", "xfer/#")


def acl_file(
    prefix: str,
    site: str,
    *,
    controllers: Sequence[str] = (),
    readers: Sequence[str] = (),
    announced: Sequence[str] = (),
    home_assistant: str | None = None,
    images: Sequence[str] = (),
) -> str:
    """Text of a mosquitto `acl_file`. What is not listed is refused.

    A device logs in with its name (`%u`: with mutual TLS the common name of its certificate). It cannot write its own
    commands or its own desired state, nor see another device.

    Args:
        controllers: users who may command every device of the site.
        readers: users who may read everything of the site, and write nothing.
        announced: devices that announce themselves to Home Assistant.
        home_assistant: the user that Home Assistant logs in as.
        images: topics outside our own tree whose images any device may take as frames.
    Raises: ConfigError for a name that could not be a user, or a level of a topic, here.
    """
    hubs = () if home_assistant is None else (home_assistant,)
    levels = [level for topic in (prefix, *images) for level in topic.split("/")]
    for name in (site, *levels, *controllers, *readers, *announced, *hubs):
        if not NAME.fullmatch(name):
            raise ConfigError(f"{name!r:.80} cannot be a name here", remedy="letters, digits, `_`, `-` and `.`")
    root = f"{prefix}/{site}"
    lines = ["# Devices: %u is the name that one logged in with.", *_device_lines(root)]
    lines += [f"pattern read {topic}" for topic in images]
    for name in announced:
        topic = discovery_topic(site, name)
        lines += ["", f"user {name}", f"topic write {topic}", f"topic read {STATUS_TOPIC}"]
    for name in controllers:
        lines += ["", f"user {name}", f"topic read {root}/#", f"topic readwrite {root}/{CONTROLLER}/{name}/#"]
        lines += [f"topic write {root}/+/{part}" for part in ORDERED]
        lines.append(f"topic write {root}/{GROUP}/+/cmd/#")
    for name in readers:
        lines += ["", f"user {name}", f"topic read {root}/#"]
    for name in hubs:
        lines += ["", f"user {name}", f"topic read {root}/#", f"topic readwrite {PREFIX}/#"]
    return "\n".join(lines) + "\n"


def acl_of(
    devices: Sequence[AgentSettings],
    *,
    controllers: Sequence[str] = (),
    readers: Sequence[str] = (),
    home_assistant: str | None = None,
) -> str:
    """`acl_file` for the site of these devices, with what they publish and read beside their own tree.

    Raises: ConfigError if one of them has no broker, or if they are of different sites.
    """
    sites = {(one.mqtt.prefix if one.mqtt is not None else None, one.site) for one in devices}
    if len(sites) != 1 or (None, devices[0].site) in sites:
        raise ConfigError(
            f"these are no devices of one site with one broker: {', '.join(one.device for one in devices)}",
            remedy="give configurations with `mqtt`, all with the same `site` and `mqtt.prefix`",
        )
    ((prefix, site),) = sites
    return acl_file(
        str(prefix),
        site,
        controllers=controllers,
        readers=readers,
        announced=[one.device for one in devices if one.telemetry.home_assistant],
        home_assistant=home_assistant,
        images=sorted({one.source.topic for one in devices if one.source.kind == "mqtt" and one.source.topic}),
    )


def _device_lines(root: str) -> list[str]:
    lines = [f"pattern write {root}/%u/{part}" for part in WRITTEN]
    lines += [f"pattern read {root}/%u/{part}" for part in READ]
    lines.append(f"pattern read {root}/{GROUP}/+/cmd/#")
    lines.append(f"pattern write {root}/{CONTROLLER}/+/reply/%u/#")
    return lines


def mosquitto_conf(
    settings: MqttSettings,
    folder: Path,
    *,
    acl: Path,
    passwords: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> str:
    """Text of a `mosquitto.conf` that fits these settings, for mosquitto 2.0 or newer.

    Args:
        folder: where mosquitto keeps retained values and sessions; must exist and end up writable for it.
        acl: the file that `acl_file` filled.
        passwords: made by `mosquitto_passwd`; None: certificates alone.
        certificate, key: of the broker; needed where the settings have `tls`.
    Raises: ConfigError if the settings ask for TLS and the broker has no certificate.
    """
    lines = [
        f"listener {settings.port} {'127.0.0.1' if settings.tls is None else '0.0.0.0'}",
        "allow_anonymous false",
        f"acl_file {acl}",
        "# Without it about one message in a thousand waits 40 ms (Nagle and delayed acknowledgement).",
        "set_tcp_nodelay true",
        f"max_packet_size {settings.max_payload + 4096}",
        "max_queued_messages 10000",
        "# Retained values and sessions outlive a kill by at most this many seconds.",
        "persistence true",
        f"persistence_location {folder}/",
        "autosave_interval 60",
        f"persistent_client_expiration {max(1, settings.session_expiry_s // 3600)}h",
    ]
    if passwords is not None:
        lines.append(f"password_file {passwords}")
    if settings.tls is not None:
        if certificate is None or key is None:
            raise ConfigError("the settings have `tls`, and the broker no certificate", remedy="give its PEM files")
        lines += [f"cafile {settings.tls.ca}", f"certfile {certificate}", f"keyfile {key}", "tls_version tlsv1.2"]
        if settings.tls.certificate is not None:
            lines += ["require_certificate true", "use_identity_as_username true"]
    return "\n".join(lines) + "\n"
