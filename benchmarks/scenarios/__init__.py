"""Scenarios: which frames come when. Pure and seeded; an id never changes its meaning."""

from __future__ import annotations

from functools import partial

from benchmarks.scenarios.domains import (
    FEW,
    clean_return,
    corrupted,
    gradual,
    mixed_domains,
    mixed_return,
    natural,
    recurring,
)
from benchmarks.scenarios.foreign import contaminated
from benchmarks.scenarios.labels import (
    BURST,
    RUN,
    Order,
    burst,
    bursts,
    correlated,
    label_shift,
    long_tailed,
    mixed_domains_correlated,
)
from benchmarks.scenarios.stream import Frames, Scenario, Shift
from benchmarks.scenarios.time import REPEATS, long, real, sensor_freeze
from edge_adapt import plugins
from edge_adapt.errors import ConfigError, did_you_mean

__all__ = ["Frames", "SCENARIOS", "Scenario", "Shift", "corrupted", "get", "names"]

ORDERS: dict[Order, str] = {
    "forward": "the first class is the most frequent",
    "uniform": "as many frames, all classes alike",
    "backward": "the last class is the most frequent",
}
DOMAINS = (
    Scenario("continual", "one corruption after the other, never reset", corrupted),
    Scenario("reset_each_shift", "one corruption after the other, from source each time", corrupted, reset=True),
    Scenario("natural", "the data as stored, in order, nothing added", natural),
    Scenario("gradual", "continual, each corruption from severity 1 up and down again", gradual),
    Scenario("recurring", "a few corruptions in turn, each of which returns five times", recurring, corruptions=FEW),
    Scenario("clean_return", "continual, with clean frames before and after each corruption", clean_return),
    Scenario("mixed_domains", "every frame of a random corruption", mixed_domains),
    Scenario(
        "mixed_return", "a few corruptions in turn, then frames of all of them mixed", mixed_return, corruptions=FEW
    ),
)
LABELS = (
    *(
        Scenario(
            f"long_tailed_{imbalance}_{order}",
            f"continual, class frequencies {imbalance} to 1: {meaning}",
            partial(long_tailed, imbalance=imbalance, order=order),
        )
        for imbalance in (10, 100)
        for order, meaning in ORDERS.items()
    ),
    Scenario("bursts", f"continual, in runs of {RUN} frames of one class", bursts),
    Scenario("correlated", "continual, labels correlated in time (Dirichlet, delta 0.1)", correlated),
    Scenario("mixed_domains_correlated", "mixed domains, labels correlated in time", mixed_domains_correlated),
    Scenario("label_shift", "continual, class frequencies drift, 100 to 1 at any time", label_shift),
    Scenario("burst", f"a few corruptions, each with {BURST} frames of one class halfway", burst, corruptions=FEW),
)
TIME = (
    Scenario("long", f"continual, {REPEATS} times over", long),
    Scenario("sensor_freeze", "continual, and now and then the sensor sticks at a frame, not scored", sensor_freeze),
    Scenario("real", "a recording in order of time, nothing added, one shift for each stretch without a gap", real),
)
FOREIGN = tuple(
    Scenario(
        name,
        f"continual, and {percent} % of the frames are foreign and not scored",
        partial(contaminated, share=percent / 100),
        contaminated=True,
    )
    for name, percent in (("contaminated", 30), ("contaminated_10", 10), ("contaminated_30", 30))
)
SCENARIOS = {scenario.name: scenario for scenario in (*DOMAINS, *LABELS, *TIME, *FOREIGN)}


def names() -> list[str]:
    """Every id: ours, and those that installed packages bring."""
    return sorted({*SCENARIOS, *plugins.names(plugins.SCENARIOS)})


def get(name: str) -> Scenario:
    """A scenario by its id; nobody else can take one of ours.

    Raises: ConfigError with the nearest ids, or if what a package registered is no scenario; EngineError if it cannot
    be imported.
    """
    if name in SCENARIOS:
        return SCENARIOS[name]
    if name not in plugins.names(plugins.SCENARIOS):
        raise ConfigError(f"there is no scenario {name!r}", remedy=did_you_mean(name, names()))
    found = plugins.find(plugins.SCENARIOS, name)
    if not isinstance(found, Scenario):
        raise ConfigError(
            f"scenario {name!r} is a {type(found).__name__}, expected benchmarks.scenarios.Scenario",
            remedy="see the example under examples/",
        )
    return found
