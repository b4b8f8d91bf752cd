"""The configuration of an agent: what `edge-adapt run CONFIG.yaml` reads. Strict; every field has a default but two.

A field marked `LIVE` changes while the agent runs; another one needs a restart, and a reload says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from edge_adapt.errors import did_you_mean
from edge_adapt.monitor.sensor import FROZEN_AFTER
from edge_adapt.plugins import SOURCES, names
from edge_adapt.streams.live.factory import KINDS

Mode = Literal["shadow", "recommend", "bounded_auto"]
Positive = Annotated[float, Field(gt=0, le=1e6)]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def live(default: Any, **facts: Any) -> Any:
    """A field that may change while the agent runs."""
    return Field(default, json_schema_extra={"live": True}, **facts)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSettings(_Strict):
    """What runs the network."""

    name: str = Field("onnxruntime", description="an installed engine")
    threads: int = Field(1, ge=1, le=256, description="intra-operator threads")


class SourceSettings(_Strict):
    """Where frames come from."""

    kind: str = Field(description="archive, folder, camera, video, mqtt, or a source that a package brings")
    path: Path | None = Field(None, description="archive (.npz), folder to watch, or video file")
    device: int | str = Field(0, description="camera: index, device file, or address of a stream")
    topic: str | None = Field(None, description="mqtt: topic of encoded images (JPEG or PNG), outside our own tree")
    place: str | None = Field(None, description="source of a package: what it is built from")
    fps: Positive | None = Field(None, description="frames a second; none: as fast as they come")
    loop: bool = Field(False, description="archive and video: begin again at the end")
    queue: int = Field(8, ge=1, le=4096, description="frames that may wait to be answered")
    policy: Literal["newest", "oldest", "block"] = Field(
        "newest", description="which frame survives in a full queue; `block` makes the source wait"
    )
    batch: int = Field(1, ge=1, le=1024, description="at most so many waiting frames are answered together")
    frozen_after: int = Field(
        FROZEN_AFTER, ge=2, le=1_000_000, description="so many identical frames in a row: the sensor is stuck"
    )

    @model_validator(mode="after")
    def _complete(self) -> SourceSettings:
        if self.kind in ("archive", "folder", "video") and self.path is None:
            raise ValueError(f"a source of kind {self.kind} needs `path`")
        if self.kind == "mqtt" and self.topic is None:
            raise ValueError("a source of kind mqtt needs `topic`")
        if self.kind not in KINDS:
            if self.kind not in (brought := names(SOURCES)):
                raise ValueError(f"there is no source {self.kind!r}; {did_you_mean(self.kind, [*KINDS, *brought])}")
            if self.place is None:
                raise ValueError(f"a source of kind {self.kind} needs `place`")
        return self


class MethodSettings(_Strict):
    """What learns."""

    name: str = Field("auto", description="method, with wrappers behind plus signs")
    settings: dict[str, Any] = Field(default_factory=dict, description="values for fields of the method's config")
    router: str | dict[str, Any] = Field(
        "none", description="`hdc` tells domains apart and gives each its own state; or its settings; `none`: one state"
    )
    seed: int = 0
    device: Literal["cpu", "cuda", "auto"] = Field(
        "cpu", description="where the tail learns; `auto` takes a GPU if there is one"
    )
    device_memory_mb: Positive | None = Field(None, description="what PyTorch may take of the GPU's memory")


class BudgetSettings(_Strict):
    """What learning may cost; answering is never limited by it."""

    learn_ms_per_s: Positive = live(250.0, description="milliseconds of learning in each second, on average")
    memory_mb: Positive | None = live(None, description="resident memory above which learning stops")
    temperature_c: float | None = live(None, description="temperature of the board above which learning stops")
    power_w: Positive | None = live(None, description="power draw above which learning stops, where the board tells")
    queue: int = Field(4, ge=1, le=256, description="looks that may wait to be learned from; more are shed")


class SnapshotSettings(_Strict):
    """What survives a power cut."""

    every_s: Positive = live(30.0, description="seconds between snapshots while something is learned")
    probation_batches: int = live(64, ge=1, description="looks after which a new adapter is trusted, or rolled back")


class SupervisorSettings(_Strict):
    """When a part of the agent counts as stuck, and how often it may be started again."""

    stuck_s: Positive = Field(10.0, description="a part that shows no life for so long is started again")
    restarts: int = Field(5, ge=0, description="so many restarts ...")
    restart_window_s: Positive = Field(60.0, description="... within so many seconds; after that the agent is `safe`")
    drain_s: Positive = Field(5.0, description="a graceful stop takes at most so long")


class TlsSettings(_Strict):
    """Certificates, PEM files."""

    ca: Path = Field(description="certificate authority of the broker")
    certificate: Path | None = Field(None, description="of this device, for mutual TLS")
    key: Path | None = Field(None, description="private key of that certificate")
    accept_wrong_clock: bool = Field(
        False, description="while the clock is not set, accept a broker whose certificate is not valid today"
    )


class MqttSettings(_Strict):
    """The broker. Nothing depends on it: without one the agent answers and learns all the same."""

    host: str = "127.0.0.1"
    port: int = Field(1883, ge=1, le=65535)
    prefix: str = Field("ea/v1", description="first levels of every topic")
    protocol: Literal["5", "3.1.1"] = "5"
    username: str | None = None
    password_file: Path | None = Field(None, description="file that holds the password")
    tls: TlsSettings | None = None
    insecure: bool = Field(False, description="allow plain TCP to a broker on another machine")
    keepalive_s: int = Field(20, ge=2, le=3600)
    session_expiry_s: int = Field(3600, ge=0)
    max_payload: int = Field(16_384, ge=1024, le=1_048_576, description="largest payload in bytes")
    outbox_mb: Positive = Field(64.0, description="disk space for what waits while the broker is away")
    groups: tuple[str, ...] = Field((), description="groups whose broadcast commands are obeyed")
    trusted_keys: tuple[Path, ...] = Field((), description="Ed25519 public keys that may sign adapters")

    @field_validator("prefix")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not all(NAME.fullmatch(level) for level in value.split("/")):
            raise ValueError("expected levels of letters, digits, `_`, `-` and `.`, with slashes between")
        return value

    @model_validator(mode="after")
    def _safe(self) -> MqttSettings:
        if self.tls is None and not self.insecure and self.host not in LOOPBACK:
            raise ValueError(f"plain TCP to {self.host} can be read by anyone: set `tls`, or `insecure: true`")
        return self


class TelemetrySettings(_Strict):
    """How often the agent tells."""

    interval_s: Positive = live(10.0, description="seconds between reports of each group, at most")
    minimum_s: Positive = live(1.0, description="seconds between two reports of a group, at least")
    home_assistant: bool = Field(False, description="announce the device to Home Assistant")


class PageSettings(_Strict):
    """The local page, /metrics, /livez and /readyz."""

    host: str = "127.0.0.1"
    port: int = Field(8765, ge=0, le=65535, description="0: any free port")
    insecure: bool = Field(False, description="allow the page to be reached from other machines")

    @model_validator(mode="after")
    def _safe(self) -> PageSettings:
        if self.host not in LOOPBACK and not self.insecure:
            raise ValueError(f"the page has no password and would be open on {self.host}: set `insecure: true`")
        return self


class AgentSettings(_Strict):
    """One agent on one device."""

    schema_version: Literal[1] = 1
    site: str = Field("site", description="where the device stands; a level of its topics")
    device: str = Field("device", description="its name: level of its topics, client id, name of its certificate")
    bundle: Path = Field(description="folder of a bundle made by `edge-adapt export`")
    state_dir: Path = Field(Path("state"), description="folder for snapshots, outbox and command ledger")
    mode: Mode = live(
        "shadow",
        description="`shadow` learns and answers from source; `recommend` also asks for approval; "
        "`bounded_auto` answers with what was learned",
    )
    source: SourceSettings
    engine: EngineSettings = EngineSettings()
    method: MethodSettings = MethodSettings()
    budget: BudgetSettings = live(BudgetSettings())
    snapshots: SnapshotSettings = live(SnapshotSettings())
    supervisor: SupervisorSettings = SupervisorSettings()
    mqtt: MqttSettings | None = Field(None, description="none: no broker")
    telemetry: TelemetrySettings = live(TelemetrySettings())
    page: PageSettings | None = Field(None, description="none: no page")
    record_mb: Positive | None = Field(None, description="size of the recording kept on disk; none: no recording")
    log_level: Literal["debug", "info", "warning", "error"] = live("info")

    @field_validator("site", "device")
    @classmethod
    def _name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("expected 1 to 64 letters, digits, `_`, `-` and `.`, beginning with a letter or digit")
        return value
