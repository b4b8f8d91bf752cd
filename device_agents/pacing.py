"""Pure timers of the link: when to try again, how fast to tell. Time is an argument, in milliseconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

Uniform = Callable[[float, float], float]


@dataclass
class Backoff:
    """Full jitter: a wait drawn between 0 and a bound that doubles from `low_s` to `high_s`."""

    low_s: float
    high_s: float
    stable_s: float
    """A connection that lasted so long starts over at `low_s`."""
    uniform: Uniform = random.uniform
    failures: int = 0

    def wait_ms(self, *, lasted_ms: float = 0.0, hopeless: bool = False) -> float:
        """How long to wait after a failure. `hopeless`: a person has to act, so the longest wait, half of it chance."""
        if lasted_ms >= self.stable_s * 1000:
            self.failures = 0
        bound = min(self.high_s, self.low_s * 2.0 ** min(self.failures, 30))
        self.failures += 1
        if hopeless:
            return 1000 * self.uniform(self.high_s / 2, self.high_s)
        return 1000 * self.uniform(0.0, bound)


@dataclass
class Bucket:
    """`burst` at once, then `rate` a second."""

    rate: float
    burst: float
    tokens: float = field(init=False)
    _at_ms: float | None = None

    def __post_init__(self) -> None:
        self.tokens = self.burst

    def take(self, now_ms: float) -> bool:
        """One token, if there is one."""
        if self._at_ms is not None:
            self.tokens = min(self.burst, self.tokens + self.rate * max(0.0, now_ms - self._at_ms) / 1000)
        self._at_ms = now_ms
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


@dataclass
class Suppressed:
    """What a bucket held back, told once it is calm for `calm_ms`, or every `most_ms` in a lasting flood."""

    calm_ms: float = 1_000
    most_ms: float = 10_000
    kinds: dict[str, int] = field(default_factory=dict)
    _first_ms: float = 0.0
    _last_ms: float = 0.0

    def add(self, kind: str, now_ms: float) -> None:
        if not self.kinds:
            self._first_ms = now_ms
        self._last_ms = now_ms
        self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def due(self, now_ms: float) -> dict[str, int]:
        """How many of each kind, if it is time to tell; then it starts over. Else empty."""
        if not self.kinds or (now_ms - self._last_ms < self.calm_ms and now_ms - self._first_ms < self.most_ms):
            return {}
        told, self.kinds = self.kinds, {}
        return told
