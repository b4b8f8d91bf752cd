"""What learning may cost: milliseconds in each second, memory, heat, power. Answering has no budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

BURST_S = 2.0
"""Unspent milliseconds of so many seconds may be saved up."""
COOLER_C, LESS = 5.0, 0.95
"""Learning begins again when the board is so much cooler, and when memory or power fell to this share of the limit."""
MEMORY, THERMAL, POWER, SPENT = "memory", "thermal", "power", "spent"


@dataclass(frozen=True)
class Limits:
    """None: no limit."""

    learn_ms_per_s: float = 250.0
    memory_mb: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None


class Budget:
    """A token bucket for time, and limits with hysteresis for what the board tells. Not thread-safe: the learner's."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        """clock: monotonic seconds."""
        self._clock = clock
        self._limits = limits
        self._tokens = limits.learn_ms_per_s * BURST_S
        self._filled = clock()
        self._held: frozenset[str] = frozenset()

    @property
    def limits(self) -> Limits:
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        """New limits, at once; what was saved up does not grow by it."""
        self._fill()
        self._limits = limits
        self._tokens = min(self._tokens, limits.learn_ms_per_s * BURST_S)

    @property
    def reasons(self) -> frozenset[str]:
        """Why the board does not allow learning: `memory`, `thermal`, `power`."""
        return self._held

    def denies(self) -> str | None:
        """Why there may be no learning now, or None."""
        self._fill()
        if self._held:
            return min(self._held)
        return None if self._tokens > 0 else SPENT

    def spend(self, seconds: float) -> None:
        """Learning took so long. It may have been more than was left: then the next one waits longer."""
        self._fill()
        self._tokens -= 1000 * seconds

    def told(self, host: Mapping[str, float]) -> None:
        """What the board measures: `rss_mb`, `temperature_c`, `power_w`; what is missing limits nothing."""
        limits = self._limits
        self._held = frozenset(
            name
            for name, value, limit, again in (
                (MEMORY, host.get("rss_mb"), limits.memory_mb, _share),
                (THERMAL, host.get("temperature_c"), limits.temperature_c, _cooler),
                (POWER, host.get("power_w"), limits.power_w, _share),
            )
            if value is not None and limit is not None and value > (again(limit) if name in self._held else limit)
        )

    def _fill(self) -> None:
        now = self._clock()
        rate = self._limits.learn_ms_per_s
        self._tokens = min(rate * BURST_S, self._tokens + (now - self._filled) * rate)
        self._filled = now


def _share(limit: float) -> float:
    return LESS * limit


def _cooler(limit: float) -> float:
    return limit - COOLER_C
