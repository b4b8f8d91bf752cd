"""The core: bundle, engine, method and live loop of an agent, and how they are made anew when one of them is stuck."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from device_agents.settings import AgentSettings, BudgetSettings, MethodSettings
from device_agents.wishes import may_answer
from edge_adapt.bundle import Bundle
from edge_adapt.engines.protocol import Engine
from edge_adapt.errors import EdgeAdaptError, EngineError
from edge_adapt.methods.catalogue import ROUTER, build
from edge_adapt.methods.protocol import Context, Method
from edge_adapt.monitor.gauge import Gauge
from edge_adapt.plugins import ENGINES, find
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.budget import Budget, Limits
from edge_adapt.runtime.live import SOURCE, Learned, LiveLoop
from edge_adapt.runtime.predictor import Predictor

if TYPE_CHECKING:
    from edge_adapt.tail import Tail

Loop = LiveLoop[Any]
WARM_UPS = 2
"""Answers given before the first frame, so that none pays for a cold engine."""


class Core:
    """What answers and learns. `loop` is replaced whole by `rebuild`; a reader keeps the one that it took."""

    def __init__(self, settings: AgentSettings, tell: Callable[[str], None]) -> None:
        """tell: takes events of the method and its guards, in the learning thread.

        Raises: ConfigError, ArtifactError, EngineError.
        """
        self.settings, self._tell = settings, tell
        self.bundle = Bundle.load(settings.bundle)
        self.preprocess = Preprocess(self.bundle.manifest.input)
        chosen = settings.method
        tail = lru_cache(maxsize=1)(lambda: _tail(self.bundle, chosen))
        given = {ROUTER: chosen.router, **chosen.settings}
        self.method: Method[Any] = build(chosen.name, Context(self.bundle, tail, seed=chosen.seed, settings=given))
        self.gauge = Gauge(self.bundle)
        self.budget = Budget(limits_of(settings.budget), time.monotonic)
        self.loop = self._made(None)
        self.rebuilds = 0
        self.warm_up_s = 0.0
        """Seconds that the first answers took."""

    @property
    def learned(self) -> Learned[Any]:
        return self.loop.learned

    def rebuild(self) -> None:
        """Another engine and another loop, from what was learned last; the old ones are left to whoever is stuck in
        them. Raises: EngineError."""
        self._replace(self.learned)

    def give_up(self) -> None:
        """The same, but nothing is learned any more, and source answers: whoever comes next finds nothing to get stuck
        in. Raises: EngineError; then what was in force still is."""
        self._replace(replace(self.learned, frozen=True, slot=SOURCE, probation=None, given=None))

    def _replace(self, learned: Learned[Any]) -> None:
        self._check_bundle()
        old = self.loop
        self.loop = self._made(learned)
        self.loop.counts.update(old.counts)
        self.loop.learn_s = old.learn_s
        self.rebuilds += 1
        old.close()

    def _check_bundle(self) -> None:
        """An engine is made of files, and they may be others by now. Raises: EngineError."""
        path = self.bundle.path
        try:
            same = Bundle.load(path).id == self.bundle.id
        except EdgeAdaptError as error:
            raise EngineError(f"no new engine: {error.what}", remedy="put the bundle back") from error
        if not same:
            raise EngineError(f"bundle {path} was replaced while the agent runs", remedy="restart the agent")

    def warm_up(self) -> None:
        """Run every session once that answers and looks will use. Raises: EngineError."""
        loop, started = self.loop, time.monotonic()
        frames = np.zeros((1, *self.bundle.manifest.input.shape), np.float32)
        needs = loop.method.needs | loop.method.watches | self.gauge.needs
        for _ in range(WARM_UPS):
            loop.predictor.answer(frames)
            if needs:
                loop.predictor.look(frames, needs)
        self.warm_up_s = time.monotonic() - started

    def _made(self, begin: Learned[Any] | None) -> Loop:
        settings = self.settings
        kind = find(ENGINES, settings.engine.name)
        reason = kind.probe()
        if reason is not None:
            raise EngineError(f"engine {settings.engine.name!r} cannot run here: {reason}", remedy="use onnxruntime")
        engine: Engine = kind(self.bundle, threads=settings.engine.threads)
        begin = begin or Learned(self.method.init(), may_answer=may_answer(settings.mode))
        return LiveLoop(
            Predictor(self.bundle, engine),
            self.method,
            self.budget,
            queue=settings.budget.queue,
            begin=begin,
            gauge=self.gauge,
            tell=self._tell,
        )


def limits_of(budget: BudgetSettings) -> Limits:
    """The part of the settings that the budget keeps."""
    return Limits(budget.learn_ms_per_s, budget.memory_mb, budget.temperature_c, budget.power_w)


def _tail(bundle: Bundle, method: MethodSettings) -> Tail:
    """Loads torch, which methods without gradients never do."""
    from edge_adapt.far import tail_on

    return tail_on(bundle, method.device, method.device_memory_mb)
