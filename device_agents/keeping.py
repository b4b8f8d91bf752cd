"""Keeping what was learned: snapshots now and then and on demand, and the way back from them."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, ClassVar

from device_agents.core import Core
from device_agents.settings import MethodSettings, SnapshotSettings
from device_agents.stages import TICK_S, Stage
from edge_adapt.errors import EdgeAdaptError, StateError
from edge_adapt.runtime.live import GIVEN, OWN, Learned
from edge_adapt.runtime.probation import Probation
from edge_adapt.runtime.snapshot_file import Facts, Snapshot
from edge_adapt.runtime.snapshots import SLOTS, SnapshotStore

FROM_OUTSIDE = "adapter from outside"
"""Note of a snapshot that is no state of our method, but an adapter that was trusted."""
Tell = Callable[[str, str, str], None]


class KeepStage(Stage):
    """Saves every so often while something is learned. A disk that refuses is told of, and tried again."""

    name: ClassVar[str] = "keeping"

    def __init__(
        self, core: Core, store: SnapshotStore, settings: SnapshotSettings, wall_ms: Callable[[], int], tell: Tell
    ) -> None:
        """tell: takes kind, text and severity of what is worth an event."""
        super().__init__()
        self.core, self.store, self.settings = core, store, settings
        self.trouble: str | None = None
        """Why the last snapshot could not be saved."""
        self.saved_at: float | None = None
        """When the last one was, monotonic."""
        self._wall_ms, self._tell = wall_ms, tell
        self._saved = core.learned
        self._due = time.monotonic() + settings.every_s
        self._writing = threading.Lock()
        self._wake = threading.Event()
        self._trials = threading.Lock()
        self._on_trial = False
        """True from the begin of a probation until its end was written down."""
        self._method = method_id(core.settings.method)

    def begin(self) -> None:
        """At start: go on from the latest good snapshot, and with an adapter whose probation was cut short."""
        found = self.store.load_latest()
        if found is not None:
            self._go_on(found)
        self.begin_trial()
        while self.core.loop.work():
            pass
        for report in self.store.take_reports():
            self._tell("fault", f"snapshots: {report}", "warning")
        self._saved = self.core.learned

    def _go_on(self, found: Snapshot) -> None:
        loop = self.core.loop
        asked = loop.ask(self.from_snapshot(found))
        while loop.work():
            pass
        try:
            asked.result(timeout=0)
        except EdgeAdaptError as error:
            self._tell("fault", f"snapshot {found.slot} cannot be used: {error.what}; source answers", "warning")

    def latest(self, slot: str) -> Snapshot:
        """The latest good snapshot of `own` or `adapter`. Raises: StateError if there is none."""
        for file in sorted(SLOTS, key=lambda name: name != self.store.current):
            try:
                found = self.store.load(file)
            except EdgeAdaptError:
                continue
            if slot_of(found) == slot:
                return found
        raise StateError(
            f"no snapshot of {slot!r} is kept", remedy="`snapshot` keeps what answers now; `source` is always there"
        )

    def from_snapshot(self, found: Snapshot) -> Callable[[Learned[Any]], Learned[Any]]:
        """A wish for the live loop: what was in force then. Its state, if it is of this method; else its delta."""
        method, name = self.core.method, self._method

        def change(learned: Learned[Any]) -> Learned[Any]:
            fresh = replace(learned, probation=None, given=None, failures=0)
            if slot_of(found) == GIVEN:
                return replace(fresh, given=found.delta, slot=GIVEN)
            if found.facts.method != name:
                raise StateError(
                    f"it was learned by {found.facts.method!r}, the configuration says {name!r}",
                    remedy="set the method back, or start from source",
                )
            return replace(fresh, state=found.state(method), slot=OWN)

        return change

    def on_trial(self, found: Snapshot) -> Callable[[Learned[Any]], Learned[Any]]:
        """A wish: let an adapter answer, on probation."""
        bundle, looks = self.core.bundle, self.settings.probation_batches

        def change(learned: Learned[Any]) -> Learned[Any]:
            bundle.check_delta(found.delta)
            fallback = OWN if learned.slot == GIVEN else learned.slot
            return replace(
                learned, given=found.delta, slot=GIVEN, probation=Probation(bundle, looks, fallback=fallback)
            )

        return change

    def turn(self) -> None:
        self._wake.wait(TICK_S)
        self._settle_trial()
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + self.settings.every_s
            if self._is_new(self.core.learned):
                self.try_to_save("now and then")

    def stop(self, timeout_s: float) -> bool:
        self._stopping.set()
        self._wake.set()
        return super().stop(timeout_s)

    def _is_new(self, learned: Learned[Any]) -> bool:
        return learned.state is not self._saved.state or learned.given is not self._saved.given

    def begin_trial(self) -> Future[Learned[Any]] | None:
        """Put the adapter that waits on probation; None if there is none, or its probation began already."""
        with self._trials:
            pending = self.store.begin_trial() if self.store.pending and not self._on_trial else None
            if pending is None:
                return None
            self._on_trial = True
            return self.core.loop.ask(self.on_trial(pending))

    def _settle_trial(self) -> None:
        """An adapter whose probation is over: keep it, or put it aside. One that somebody put there: try it."""
        if not self.store.pending:
            return
        if not self._on_trial:
            self.begin_trial()
            return
        with self._trials:
            learned = self.core.learned
            if learned.probation is not None:
                return
            try:
                if learned.slot == GIVEN:
                    self.store.commit()
                else:
                    self.store.rollback()
                self._on_trial, self.trouble = False, None
            except EdgeAdaptError as error:
                self._failed(error)

    def try_to_save(self, note: str) -> Snapshot | None:
        """Save; None, and trouble, if the disk refuses."""
        try:
            return self.save(note)
        except EdgeAdaptError as error:
            self._failed(error)
            return None

    def save(self, note: str) -> Snapshot:
        """Save what is learned now. Raises: StateError; what was kept before is still there then."""
        with self._writing:
            loop = self.core.loop
            learned = loop.learned
            facts = Facts(
                version=loop.predictor.version,
                ts=self._wall_ms(),
                method=self._method,
                frames=loop.predictor.passes,
                note=note,
            )
            if learned.slot == GIVEN and learned.given is not None and learned.probation is None:
                made = self.store.save(learned.given, replace(facts, note=FROM_OUTSIDE))
            else:
                own = self.core.method.delta(learned.state)
                made = self.store.save(own, facts, method=self.core.method, state=learned.state)
            self._saved, self.saved_at = learned, time.monotonic()
            if self.trouble is not None:
                self._tell("fault", "snapshots can be saved again", "info")
            self.trouble = None
            return made

    def _failed(self, error: EdgeAdaptError) -> None:
        if self.trouble is None:
            self._tell("fault", f"no snapshot: {error.what}", "error")
        self.trouble = error.what


def slot_of(found: Snapshot) -> str:
    """What a snapshot that was read from a file is of: `own` or `adapter`."""
    return GIVEN if found.facts.note == FROM_OUTSIDE or found.structure is None else OWN


def method_id(method: MethodSettings) -> str:
    """The name of a method, and a digest of its settings if it has any: a state fits no other."""
    if not method.settings:
        return method.name
    text = json.dumps(method.settings, sort_keys=True, default=str)
    return f"{method.name} with settings {hashlib.sha256(text.encode()).hexdigest()[:8]}"
