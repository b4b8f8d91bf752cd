"""From settings to a connection: the options of a link, and what a lost one asks of a person."""

from __future__ import annotations

from typing import TypeGuard

from device_agents.envelope import Clock, Envelopes, unwrap
from device_agents.mqtt import AUTH_CODES, PROTOCOL_CODE, TAKEN_OVER, Down, LinkOptions, Message
from device_agents.settings import MqttSettings
from device_agents.tls import days_left, tls_context
from device_agents.topics import Topics
from edge_adapt.errors import ConfigError

DUEL, PATIENCE = 2, 8
ALARM_DAYS = 14.0
RIVALS, NAME_CHARS = 16, 64
"""Processes that are told apart at a time, and the longest name of one."""


class Rival:
    """Notices another client that uses our client id: not every broker says so when it throws one of them out.

    Each time it comes back, an agent looks at the retained birth. Its own means: nobody was here. Two different ones
    of one other process mean that it fights us for the session. Of the two, the one whose boot id sorts first gives
    up; the other waits for that, and gives up too only if it never happens. What stood there at our first connection
    was left by our predecessor and means nothing, nor does an old birth that a broker restored from its disk: it is
    the same one every time.
    """

    def __init__(self, boot: str) -> None:
        self._boot = boot
        self._births: dict[str, set[str]] = {}

    def met(self, birth: bytes, *, first_connection: bool) -> str | None:
        """Look at the payload of our birth topic. Returns the boot id of the rival if we have to give up."""
        try:
            envelope = unwrap(birth, limit=1 << 20)
        except ConfigError:
            return None
        boot, id_ = envelope.get("boot"), envelope.get("id")
        if not _is_name(boot) or not _is_name(id_) or boot == self._boot or first_connection:
            return None
        if boot not in self._births and len(self._births) >= RIVALS:
            self.forget()  # no fight has so many sides: somebody makes them up
        births = self._births.setdefault(boot, set())
        births.add(id_)
        return boot if len(births) >= (DUEL if self._boot < boot else PATIENCE) else None

    def forget(self) -> None:
        """A connection was stable: nobody fights for it."""
        self._births.clear()


def _is_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= NAME_CHARS


def link_options(
    settings: MqttSettings,
    topics: Topics,
    envelopes: Envelopes,
    *,
    session: int,
    clock_unset: bool,
    in_flight: int,
    largest_in: int,
) -> LinkOptions:
    """Files are read anew for each connection, so a renewed certificate is used at the next one.

    Args:
        session: goes into the will, as it does into birth and state: a late will cannot end a newer session.
    Raises: ConfigError if certificates or the password cannot be read.
    """
    lost = {"s": "lost", "boot": envelopes.boot, "bd": session}
    return LinkOptions(
        client_id=f"ea-{topics.device}",
        host=settings.host,
        port=settings.port,
        protocol=settings.protocol,
        username=settings.username,
        password=_password(settings),
        tls=tls_context(settings.tls, clock_unset=clock_unset) if settings.tls is not None else None,
        keepalive_s=settings.keepalive_s,
        session_expiry_s=settings.session_expiry_s,
        in_flight=in_flight,
        largest_in=largest_in,
        will=Message(topics.state, envelopes.wrap(lost, numbered=False), retain=True),
    )


def alert_of(down: Down) -> str | None:
    """What kind of help a lost link needs, None if it will mend itself. 0x8E: another client has our name."""
    if down.tls:
        return "tls"
    if down.code in AUTH_CODES:
        return "auth"
    if down.code == PROTOCOL_CODE:
        return "protocol"
    return "taken-over" if down.code == TAKEN_OVER else None


def _days(settings: MqttSettings, clock: Clock) -> float | None:
    """Days until our own certificate expires, negative afterwards; None: there is none, or no telling."""
    certificate = settings.tls.certificate if settings.tls is not None else None
    if certificate is None or clock.quality() == "unsync":
        return None
    try:
        return days_left(certificate, now_s=clock.wall_ms() / 1000)
    except ConfigError:
        return None


def expired(settings: MqttSettings, clock: Clock) -> bool:
    """Whether our own certificate certainly has."""
    left = _days(settings, clock)
    return left is not None and left < 0


def expiry_warning(settings: MqttSettings, clock: Clock) -> str | None:
    """That it will soon; None: it will not, or there is no telling."""
    left = _days(settings, clock)
    return None if left is None or left >= ALARM_DAYS else f"the certificate expires in {left:.1f} days"


def _password(settings: MqttSettings) -> str | None:
    if settings.password_file is None:
        return None
    try:
        return settings.password_file.read_text("utf-8").strip("\r\n")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"mqtt.password_file {settings.password_file} cannot be read: {error}",
            remedy="expected a text file with the password in one line",
        ) from error
