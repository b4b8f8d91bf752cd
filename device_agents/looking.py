"""The lookout: gathers, twice a second, what the agent knows about itself, and puts it on the board."""

from __future__ import annotations

import time
from collections import Counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from device_agents.board import Board
from device_agents.core import Core
from device_agents.decide import Facts, state_of
from device_agents.host import read_host
from device_agents.keeping import KeepStage
from device_agents.stages import AnswerStage
from edge_adapt.methods.protocol import Routes
from edge_adapt.runtime.supervisor import Supervisor

PACE_S = 5.0
"""Rates are over so many seconds."""


class LinkFacts(Protocol):
    """The part of the network that is looked at."""

    @property
    def online(self) -> bool: ...

    @property
    def waiting(self) -> int: ...

    @property
    def troubles(self) -> frozenset[str]: ...


class Lookout:
    """`look` is called by the main thread. The attributes are set by whoever knows."""

    def __init__(
        self,
        board: Board,
        core: Core,
        answering: AnswerStage,
        keeper: KeepStage,
        network: LinkFacts | None,
        supervisor: Supervisor,
    ) -> None:
        self.warm = self.draining = self.stopped = False
        self.source: str | None = None
        """Why there are no frames."""
        self.guards: Counter[str] = Counter()
        """Events of the method and its guards, by name."""
        self._board, self._core, self._answering, self._keeper = board, core, answering, keeper
        self._network, self._supervisor = network, supervisor
        self._past: list[tuple[float, int, float]] = []
        """When, frames answered, seconds of learning: of the last `PACE_S`."""

    def look(self, uptime_s: float) -> None:
        """uptime_s: seconds since the agent began."""
        core, board, network = self._core, self._board, self._network
        host = read_host()
        core.budget.told(host)
        loop, learned, counts = core.loop, core.learned, board.counts
        answered = counts.pop("answered", 0)
        state, why = state_of(self._facts())
        fps, learn_ms = self._rates(answered, loop.learn_s)
        points = board.points[-100:]
        board.update(
            state=state,
            why=why,
            mode=core.settings.mode,
            uptime_s=uptime_s,
            engine=loop.predictor.engine.description,
            slot=learned.slot if learned.slot in learned.may_answer else "source",
            version=loop.predictor.version,
            on_probation=learned.probation is not None,
            frozen=learned.frozen,
            answered=answered,
            frames={**counts, "dropped": self._answering.ring.dropped},
            fps=fps,
            latency_ms=_percentiles(board.latencies_ms),
            learn={
                "looks": loop.counts["looks"],
                "steps": loop.counts["steps"],
                "shed": loop.counts["shed"],
                "failed": loop.counts["failed"],
                "waiting": loop.waiting,
                "ms_per_s": learn_ms,
                "allowed_ms_per_s": core.budget.limits.learn_ms_per_s,
            },
            guards=dict(self.guards),
            route=core.method.route(learned.state) if isinstance(core.method, Routes) else None,
            ood=core.gauge.strange,
            estimate=core.gauge.estimate,
            confidence=float(np.mean([point.confidence for point in points])) if points else None,
            host=host,
            link="none" if network is None else "online" if network.online else "offline",
            waiting=0 if network is None else network.waiting,
            snapshot_age_s=None if self._keeper.saved_at is None else time.monotonic() - self._keeper.saved_at,
            restarts=self._supervisor.restarts,
        )

    def _facts(self) -> Facts:
        learned, troubles = self._core.learned, set(self._network.troubles if self._network else ())
        if self._keeper.trouble is not None:
            troubles.add("snapshots cannot be saved")
        if self._core.loop.predictor.trouble is not None:
            troubles.add(f"engine: {self._core.loop.predictor.trouble}")
        return Facts(
            warm=self.warm,
            draining=self.draining,
            stopped=self.stopped,
            given_up=self._supervisor.given_up,
            over_budget=self._core.budget.reasons,
            sensor=self._answering.sensor,
            source=self.source,
            learning_off=learned.frozen and learned.failures > 0,
            troubles=frozenset(troubles),
        )

    def _rates(self, answered: int, learn_s: float) -> tuple[float | None, float]:
        """Frames a second, and milliseconds of learning a second, over the last seconds."""
        now = time.monotonic()
        self._past.append((now, answered, learn_s))
        while len(self._past) > 2 and now - self._past[0][0] > PACE_S:
            self._past.pop(0)
        then, frames, seconds = self._past[0]
        if now - then < PACE_S / 10:
            return None, 0.0
        return (answered - frames) / (now - then), max(0.0, 1000 * (learn_s - seconds) / (now - then))


def _percentiles(latencies_ms: NDArray[np.float64]) -> dict[str, float]:
    """p50, p95 and p99; empty as long as there is nothing."""
    if not len(latencies_ms):
        return {}
    return {f"p{share}": float(np.percentile(latencies_ms, share)) for share in (50, 95, 99)}
