"""What learning may cost."""

from __future__ import annotations

import pytest

from edge_adapt.runtime.budget import BURST_S, Budget, Limits


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_learning_gets_its_share_of_every_second_and_no_more():
    clock = Clock()
    budget = Budget(Limits(learn_ms_per_s=100), clock)
    learned = 0.0
    for _ in range(10_000):  # 100 s, a step of 30 ms whenever it is allowed
        clock.now += 0.01
        if budget.denies() is None:
            budget.spend(0.03)
            learned += 0.03
    assert learned == pytest.approx(100 * 0.1 + BURST_S * 0.1, abs=0.05)


def test_one_long_step_is_paid_for_later():
    clock = Clock()
    budget = Budget(Limits(learn_ms_per_s=100), clock)
    budget.spend(5.0)
    clock.now += 40
    assert budget.denies() == "spent"
    clock.now += 9
    assert budget.denies() is None


@pytest.mark.parametrize(
    ("limit", "told", "above", "between", "below"),
    [
        ("memory_mb", "rss_mb", 101, 97, 94),
        ("temperature_c", "temperature_c", 101, 97, 94),
        ("power_w", "power_w", 101, 97, 94),
    ],
)
def test_a_hot_board_rests_until_it_is_clearly_cooler(limit, told, above, between, below):
    budget = Budget(Limits(**{limit: 100.0}), Clock())
    states = []
    for value in (between, above, between, below, between):
        budget.told({told: value})
        states.append(budget.denies() is not None)
    assert states == [False, True, True, False, False]


def test_what_the_board_does_not_tell_limits_nothing():
    budget = Budget(Limits(temperature_c=50.0, power_w=5.0, memory_mb=10.0), Clock())
    budget.told({})
    assert budget.denies() is None and not budget.reasons
