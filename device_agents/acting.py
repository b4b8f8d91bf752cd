"""What the verbs do: one small method each. Called from the command worker, never from the thread that answers."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, replace
from typing import Any

from device_agents.adapters import Adapters
from device_agents.board import Board
from device_agents.core import Core
from device_agents.desired import Desired
from device_agents.keeping import KeepStage, slot_of
from device_agents.recorded import Recording
from device_agents.rerun import OUTSIDE
from device_agents.wishes import NAMED, Wish
from edge_adapt.errors import ConfigError, DataError, StateError
from edge_adapt.runtime.live import GIVEN, OWN, SOURCE, Learned, Reply
from edge_adapt.runtime.snapshots import SLOTS, SnapshotStore
from edge_adapt.streams.live.protocol import Frame

GRANTED_S = 30.0
"""A wish to the learner that takes longer failed."""
ANSWERS_KEPT = 20_000
"""Latest answers, for labels that come late."""


@dataclass(frozen=True)
class Parts:
    """What the verbs act on."""

    core: Core
    board: Board
    keeper: KeepStage
    store: SnapshotStore
    desired: Desired
    adapters: Adapters
    recording: Recording
    rebirth: Callable[[], None]
    drain: Callable[[], None]


class Acting:
    """A `Control`. Everything that changes what is learned goes through the mailbox of the live loop, in order."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._answers: OrderedDict[int, int] = OrderedDict()
        """Frame number -> class, of the latest answers."""
        self._labelled = 0
        self._verbs: dict[str, Callable[..., dict[str, Any]]] = {
            "ping": self._ping,
            "rebirth": self._rebirth,
            "snapshot": self._snapshot,
            "restore": self._restore,
            "rollback": self._rollback,
            "reset": self._reset,
            "freeze": self._freeze,
            "set-mode": self._set_mode,
            "set-config": self._set_config,
            "load-adapter": self._load_adapter,
            "commit-adapter": self._commit_adapter,
            "drain": self._drain,
            "record": self._record,
            "label-reveal": self._label_reveal,
            "log-level": self._log_level,
        }

    def execute(self, verb: str, arguments: Mapping[str, Any], *, by: str) -> dict[str, Any]:
        """See `Control`."""
        result = self._verbs[verb](**{name.replace("-", "_"): value for name, value in arguments.items()})
        if verb not in ("ping", "rebirth"):
            kind = verb if verb in ("reset", "rollback") else "command"
            self._parts.board.tell(kind, f"{verb} by {by}", wall_ms(), verb=verb, by=by)
        return result

    def noted(self, frames: Sequence[Frame], reply: Reply) -> None:
        """Keep the latest answers for labels that come late. Called by the thread that answers."""
        for frame, best in zip(frames, reply.logits.argmax(axis=1), strict=True):
            self._answers[frame.number] = int(best)
        while len(self._answers) > ANSWERS_KEPT:
            self._answers.popitem(last=False)

    def _ask(self, name: str, **arguments: Any) -> Learned[Any]:
        """Have a wish of `wishes.NAMED` granted, and wait. Raises: EdgeAdaptError."""
        core = self._parts.core
        granted = self._granted(core.loop.ask(NAMED[name](core.method, **arguments)))
        self._parts.recording.wished(name, arguments, granted.done)
        return granted

    def _ask_for(self, wish: Wish, what: str) -> Learned[Any]:
        """The same for one that no record can redo. Raises: EdgeAdaptError."""
        granted = self._granted(self._parts.core.loop.ask(wish))
        self._parts.recording.note(OUTSIDE, what=what)
        return granted

    def _granted(self, asked: Future[Learned[Any]]) -> Learned[Any]:
        """Wait for a wish. Raises: EdgeAdaptError."""
        try:
            return asked.result(GRANTED_S)
        except NotYet:
            raise StateError(
                f"the learner did not get to it within {GRANTED_S:g} s", remedy="see `learn` in the status"
            ) from None

    def _ping(self) -> dict[str, Any]:
        status = self._parts.board.status
        return {"state": status.state, "uptime_s": round(status.uptime_s, 1)}

    def _rebirth(self) -> dict[str, Any]:
        self._parts.rebirth()
        return {}

    def _snapshot(self) -> dict[str, Any]:
        made = self._parts.keeper.save("asked for")
        return {"generation": made.generation}

    def _restore(self, slot: str) -> dict[str, Any]:
        if slot == SOURCE:
            self._ask("source")
        else:
            keeper = self._parts.keeper
            self._ask_for(keeper.from_snapshot(keeper.latest(slot)), f"snapshot of {slot}")
        return {"slot": slot, "version": self._parts.core.loop.predictor.version}

    def _rollback(self) -> dict[str, Any]:
        """Drop an adapter from outside if one answers; else go back one snapshot."""
        learned = self._parts.core.learned
        if learned.slot == GIVEN:
            self._ask("own")
            return {"slot": OWN}
        before = next((slot for slot in SLOTS if slot != self._parts.store.current), SLOTS[0])
        try:
            found = self._parts.store.load(before)
        except StateError as error:
            raise StateError(
                "there is no earlier snapshot to go back to", remedy="`reset` goes back to source"
            ) from error
        self._ask_for(self._parts.keeper.from_snapshot(found), f"snapshot {found.generation}")
        return {"slot": slot_of(found), "generation": found.generation}

    def _reset(self) -> dict[str, Any]:
        self._ask("reset")
        return {"version": self._parts.core.loop.predictor.version}

    def _freeze(self, on: bool) -> dict[str, Any]:
        self._ask("freeze", on=on)
        return {"frozen": on}

    def _set_mode(self, mode: str) -> dict[str, Any]:
        self._parts.desired.set({"mode": mode})
        return {"mode": mode}

    def _set_config(self, config: Mapping[str, Any], dry_run: bool = False) -> dict[str, Any]:
        found = self._parts.desired.set(config, dry_run=dry_run)
        return {"changes": [{"field": one.path, "old": one.old, "new": one.new} for one in found], "dry_run": dry_run}

    def _load_adapter(
        self, sha256: str, url: str | None = None, file: str | None = None, transfer: str | None = None
    ) -> dict[str, Any]:
        facts = self._parts.adapters.take(sha256, url=url, file=file, transfer=transfer)
        begun = self._parts.keeper.begin_trial()
        if begun is not None:  # else the keeper saw it first
            self._granted(begun)
        self._parts.recording.note(OUTSIDE, what="an adapter from outside")
        if transfer is not None:
            self._parts.adapters.transfers.forget(transfer)
        return {**facts, "probation_looks": self._parts.keeper.settings.probation_batches}

    def _commit_adapter(self) -> dict[str, Any]:
        """Trust the adapter on probation; in the mode `recommend`, approve of what the device learned."""
        core = self._parts.core

        def change(learned: Learned[Any]) -> Learned[Any]:
            if learned.given is not None:
                return replace(learned, probation=None, slot=GIVEN)
            own = core.method.delta(learned.state)
            if OWN in learned.may_answer or not own:
                raise StateError("there is no adapter to commit", remedy="load one, or let the device learn first")
            return replace(learned, given=own, slot=GIVEN)

        self._ask_for(change, "an adapter that was committed")
        made = self._parts.keeper.save("committed")
        return {"generation": made.generation}

    def _drain(self) -> dict[str, Any]:
        self._parts.drain()
        return {}

    def _record(self, on: bool, seconds: float | None = None) -> dict[str, Any]:
        return self._parts.recording.switch(on, seconds)

    def _label_reveal(self, labels: Sequence[Sequence[int]]) -> dict[str, Any]:
        classes = self._parts.core.bundle.manifest.outputs
        known = right = 0
        for number, label in labels:
            if label >= classes:
                raise DataError(f"frame {number} has label {label} of {classes} classes", remedy="count from 0")
            answered = self._answers.pop(number, None)
            if answered is not None:
                known += 1
                right += answered == label
        self._labelled += known
        self._parts.core.gauge.labelled(right, known)
        self._parts.board.update(estimate=self._parts.core.gauge.estimate)
        return {"known": known, "right": right, "labelled": self._labelled}

    def _log_level(self, level: str) -> dict[str, Any]:
        if level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"log level {level!r} is none", remedy="debug, info, warning or error")
        self._parts.desired.set({"log_level": level})
        return {"level": level}


def wall_ms() -> int:
    """Wall clock, for people."""
    return time.time_ns() // 1_000_000


def set_log_level(level: str) -> None:
    """Of everything."""
    logging.getLogger().setLevel(level.upper())
