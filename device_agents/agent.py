"""The agent: everything put together, started, watched, and stopped. What each part does stands in its own file."""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

from device_agents.acting import Acting, Parts, set_log_level, wall_ms
from device_agents.adapters import Adapters
from device_agents.board import Board
from device_agents.commands import Commands
from device_agents.core import Core, limits_of
from device_agents.desired import Desired
from device_agents.envelope import SystemClock
from device_agents.keeping import KeepStage
from device_agents.ledger import Ledger
from device_agents.looking import Lookout
from device_agents.network import Network
from device_agents.recorded import Recording
from device_agents.request import Limits
from device_agents.rerun import BEGIN
from device_agents.sdnotify import Notifier
from device_agents.settings import AgentSettings
from device_agents.stages import AnswerStage, LearnStage, OnAnswer, Stage
from device_agents.topics import Topics
from device_agents.wishes import NAMED
from edge_adapt.config import load_config
from edge_adapt.errors import EdgeAdaptError
from edge_adapt.runtime.intake import Intake
from edge_adapt.runtime.ring import Ring
from edge_adapt.runtime.snapshots import SnapshotStore
from edge_adapt.runtime.supervisor import Happening, Supervisor
from edge_adapt.streams.live.factory import open_source
from edge_adapt.streams.live.protocol import Frame

log = logging.getLogger(__name__)
TICK_S = 0.5
"""The main thread looks at everything so often."""
SNAPSHOTS, COMMANDS, DESIRED, RECORDING, INBOX = "snapshots", "commands.db", "desired.json", "recording", "inbox"
"""Names in the state folder."""

FEW = 20
"""Events of one kind that are told one by one; after that they are only counted."""
KINDS = (
    ("rollback", "rollback"),
    ("guard: rollback", "rollback"),
    ("guard", "guard"),
    ("refused", "guard"),
    ("domain", "drift"),
    ("new domain", "drift"),
    ("route", "drift"),
    ("label shift", "drift"),
    ("no label shift", "drift"),
    ("merged", "drift"),
    ("retired", "drift"),
    ("gauge", "fault"),
    ("learning", "fault"),
    ("adapter", "decision"),
)
"""Beginnings of what methods tell, and the kind of event that it is."""
NAMED_BY_START = ("learning failed", "gauge failed", "rollback", "route", "merged", "retired")
"""Beginnings that name an event; what comes behind the colon differs from time to time."""


class Agent:
    """One agent, from settings to exit code. `start` and `stop`, or `run` for both and what is between."""

    def __init__(self, settings: AgentSettings, *, config: Path | None = None) -> None:
        """config: the file to read again when told to reload. Raises: EdgeAdaptError; nothing runs then."""
        self.board, self.boot, self.config = Board(), uuid.uuid4().hex[:8], config
        self.stopping = Event()
        self._reload = Event()
        self._started = time.monotonic()
        state = settings.state_dir
        state.mkdir(parents=True, exist_ok=True)
        self.desired = Desired(settings, self._apply, path=state / DESIRED)
        self.settings = settings = self.desired.settings
        clock = SystemClock()
        self.core = Core(settings, self._method_told)
        self.store = SnapshotStore.of(state / SNAPSHOTS, self.core.bundle)
        self.keeper = KeepStage(self.core, self.store, settings.snapshots, wall_ms, self.tell)
        channels = self.core.bundle.manifest.input.channels
        source = settings.source
        self.source = open_source(
            source.kind,
            path=source.path,
            device=source.device,
            topic=source.topic,
            place=source.place,
            loop=source.loop,
            channels=channels,
        )
        self.ring: Ring[Frame] = Ring(source.queue, source.policy)
        self.intake = Intake(self.source, self.ring, fps=source.fps, tell=self._source_told)
        self.answering = AnswerStage(self.core, self.ring, self.board, wall_ms)
        self.learning = LearnStage(self.core)
        self.recording = Recording(state / RECORDING, settings.record_mb, self.answering)
        trusted = settings.mqtt.trusted_keys if settings.mqtt is not None else ()
        self.adapters = Adapters(self.store, self.core.bundle, trusted, inbox=state / INBOX)
        topics = self._topics(settings)
        self.network = (
            Network(settings, topics, self.board, clock, boot=self.boot, folder=state, about=self._about)
            if settings.mqtt is not None
            else None
        )
        acting = Acting(
            Parts(
                self.core, self.board, self.keeper, self.store, self.desired, self.adapters, self.recording,
                rebirth=self.network.rebirth if self.network else lambda: None,
                drain=self.stopping.set,
            )
        )
        self.answering.listeners.append(acting.noted)
        self.ledger = Ledger(state / COMMANDS, clock=clock)
        reply = self.network.reply if self.network else lambda reply: None
        limits = Limits(payload=settings.mqtt.max_payload) if settings.mqtt is not None else Limits()
        self.commands = Commands(acting, self.ledger, topics, reply, clock=clock, limits=limits)
        if self.network is not None:
            self.network.connect(self.commands, self.desired, self.adapters.transfers, self.source, self.tell)
        self.page = self._page()
        self.supervisor = self._supervisor()
        self.lookout = self._lookout()
        self._notifier = Notifier()

    def listen(self, listener: OnAnswer) -> None:
        """Have every answered batch told, in the thread that answers; it may not block."""
        self.answering.listeners.append(listener)

    def run(self) -> int:
        """Start, watch until told to stop or the source ended, stop. Exit code: 0, or 1 if something would not end."""
        try:
            self.start()
            while not self.stopping.wait(TICK_S):
                self._guarded_tick()
        finally:
            clean = self.stop()
        return 0 if clean else 1

    def start(self) -> None:
        """Raises: EdgeAdaptError; what was started is stopped again by `stop`."""
        set_log_level(self.settings.log_level)
        self.keeper.begin()
        self.recording.note(
            BEGIN,
            boot=self.boot,
            bundle=self.core.bundle.id,
            method=self.settings.method.model_dump(mode="json"),
            from_source=not self.core.learned.done,
        )
        self.core.warm_up()
        self.lookout.warm = True
        self.tell("state", f"started: {self.core.loop.predictor.engine.description}", "info")
        self.answering.start()
        self.learning.start()
        self.keeper.start()
        self.commands.start()
        if self.network is not None:
            self.network.start()
        if self.page is not None:
            self.page.start()
            self.tell("state", f"page at {self.page.address}", "info")
        self.intake.start()
        self.tick()
        self._notifier.ready(self._line())

    def tick(self) -> None:
        """Look at everything once. Called by the main thread; quick."""
        now = time.monotonic()
        if self._reload.is_set():
            self._reload.clear()
            self._notifier.reloading()
            self._read_again()
            self._notifier.ready(self._line())
        self.supervisor.check(now)
        self.lookout.look(now - self._started)
        if self.network is not None:
            self.network.tick(now)
        self._notifier.alive()
        self._notifier.status(self._line())
        if self.intake.ended and not len(self.ring) and not self.answering.busy:
            self.stopping.set()

    def _guarded_tick(self) -> None:
        """A bug in what watches and tells must not end the answers. The watchdog of the system hears nothing then."""
        try:
            self.tick()
        except Exception:
            log.exception("looking at the agent failed; it goes on")

    def reload(self) -> None:
        """Read the configuration again, at the next tick. Safe in a signal handler."""
        self._reload.set()

    def stop(self) -> bool:
        """Finish what was begun, save, say goodbye. True if everything ended in time."""
        self.stopping.set()
        self._notifier.stopping("draining")
        self.lookout.draining = True
        self.lookout.look(time.monotonic() - self._started)
        if self.network is not None:
            self.network.tick(time.monotonic())
        deadline = time.monotonic() + self.settings.supervisor.drain_s

        def left() -> float:
            return max(0.1, deadline - time.monotonic())

        clean = self.intake.stop(left())
        self.ring.close()
        parts: tuple[Stage | Commands, ...] = (self.answering, self.learning, self.keeper, self.commands)
        for part in parts:
            clean = part.stop(left()) and clean
        self.keeper.try_to_save("at the end")
        self.recording.close()
        self.lookout.stopped = True
        self.lookout.look(time.monotonic() - self._started)
        if self.network is not None:
            self.network.stop(left())
        if self.page is not None:
            self.page.stop()
        self.core.loop.close()
        self.core.loop.predictor.engine.close()
        self.ledger.close()
        return clean

    def tell(self, kind: str, text: str, severity: Any = "info", **facts: Any) -> None:
        """An event: on the board, in the log, and from there to whoever listens."""
        level = {"info": logging.INFO, "warning": logging.WARNING}.get(severity, logging.ERROR)
        log.log(level, "%s: %s", kind, text)
        self.board.tell(kind, text, wall_ms(), severity, **facts)

    # What others tell the agent.

    def _method_told(self, event: str) -> None:
        name = event.partition(":")[0] if event.startswith(NAMED_BY_START) else event
        self.lookout.guards[name] += 1
        if self.lookout.guards[name] > FEW and not event.startswith("rollback"):
            return  # counted, and shown as a count; a noisy guard must not drown the others
        kind = next((kind for start, kind in KINDS if event.startswith(start)), "guard")
        self.tell(kind, event, "info" if kind == "drift" else "warning")

    def _source_told(self, happening: str, text: str) -> None:
        if happening == "broken":
            self.board.count("broken")
        self.lookout.source = {"lost": text, "ended": None, "back": None}.get(happening, self.lookout.source)
        if happening != "broken" or self.board.counts["broken"] <= FEW:
            self.tell("fault" if happening in ("lost", "broken") else "state", text, "warning")

    def _supervised(self, stage: str, reason: str, happening: Happening) -> None:
        self.tell("fault", f"{stage} was {happening}: {reason}", "error", stage=stage)
        for part in (self.answering, self.learning):
            if happening == "given up" and part.name == stage:
                self._make_safe(part)

    def _make_safe(self, part: Stage) -> None:
        """Begin it one last time, where there is no method any more to get stuck in: source answers, and wishes are
        still granted."""
        try:
            self.core.give_up()
        except EdgeAdaptError as error:
            self.tell("fault", f"what answers stays as it is: {error.what}", "error")
            self.core.loop.learned = replace(self.core.learned, frozen=True)
        part.start()

    def _apply(self, settings: AgentSettings) -> None:
        """Put live settings in force, from a command, the desired document or the file."""
        old, self.settings = self.settings, settings
        self.core.settings = settings
        self.core.budget.limits = limits_of(settings.budget)
        self.keeper.settings = settings.snapshots
        if self.network is not None:
            self.network.teller.settings = settings.telemetry
        if settings.log_level != old.log_level:
            set_log_level(settings.log_level)
        if settings.mode != old.mode:
            asked = self.core.loop.ask(NAMED["mode"](self.core.method, name=settings.mode))
            mode = {"name": settings.mode}
            asked.add_done_callback(lambda granted: self.recording.wished("mode", mode, granted.result().done))
            self.tell("state", f"mode is {settings.mode}, was {old.mode}", mode=settings.mode)

    def _read_again(self) -> None:
        if self.config is None:
            return
        try:
            found = self.desired.rebase(load_config(self.config, AgentSettings))
        except EdgeAdaptError as error:
            self.tell("fault", f"the configuration was not reloaded, the old one stays: {error.what}", "error")
            return
        for change in found:
            when = "" if change.live else " (needs a restart)"
            self.tell("state", f"configuration: {change.path}: {change.old} -> {change.new}{when}")
        if not found:
            self.tell("state", "configuration: nothing changed")

    # Parts.

    @staticmethod
    def _topics(settings: AgentSettings) -> Topics:
        mqtt = settings.mqtt
        if mqtt is None:
            return Topics("ea/v1", settings.site, settings.device)
        return Topics(mqtt.prefix, settings.site, settings.device, mqtt.groups)

    def _page(self) -> Any:
        if self.settings.page is None:
            return None
        from device_agents.dashboard.server import Page

        return Page(self.settings.page, self.board, self.commands)

    def _supervisor(self) -> Supervisor:
        facts = self.settings.supervisor
        return Supervisor(
            (self.answering, self.learning, self.keeper),
            stuck_s=facts.stuck_s,
            restarts=facts.restarts,
            window_s=facts.restart_window_s,
            tell=self._supervised,
        )

    def _lookout(self) -> Lookout:
        settings, bundle = self.settings, self.core.bundle
        self.board.update(
            site=settings.site,
            device=settings.device,
            boot=self.boot,
            bundle=bundle.manifest.name,
            bundle_id=bundle.id,
            method=settings.method.name,
        )
        return Lookout(self.board, self.core, self.answering, self.keeper, self.network, self.supervisor)

    def _about(self) -> dict[str, Any]:
        """For the birth document: what this device is and can do."""
        manifest = self.core.bundle.manifest
        return {
            "edge_adapt": version("edge-adapt"),
            "bundle": {"name": manifest.name, "id": self.core.bundle.id, "classes": manifest.outputs},
            "engine": self.core.loop.predictor.engine.description,
            "method": self.settings.method.name,
            "input": list(manifest.input.shape),
            "warm_up_ms": round(1000 * self.core.warm_up_s, 1),
        }

    def _line(self) -> str:
        status = self.board.status
        return f"{status.state}, {status.mode}, {status.answered} frames answered"
