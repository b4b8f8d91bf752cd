"""The bank of entries: distances, growth, merging, retiring, and what it may take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from edge_adapt.errors import ConfigError
from edge_adapt.routing.bank import SOURCE, Bank, Cap, Usual, size

WIDTH = 256


def frames(domain: int, count: int, seed: int, weight: float = 1.0) -> np.ndarray:
    """Encodings [count, WIDTH] of unit length around the direction of a domain."""
    centre = np.zeros(WIDTH)
    centre[domain] = weight
    rows = np.random.default_rng([domain, seed]).normal(size=(count, WIDTH)) / np.sqrt(WIDTH) + centre
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def bank() -> Bank:
    """Source, and domains 1 to 3."""
    made = Bank.of(frames(0, 400, 0, 0.0).mean(axis=0), 400, "at source")
    for domain in (1, 2, 3):
        made = made.grown(frames(domain, 16, 0), f"in {domain}", now=900 + domain)
    return made


def test_a_window_of_a_known_domain_is_about_one_away_from_it(bank):
    distances = [bank.entries[2].distance(frames(2, 16, seed)) for seed in range(1, 40)]
    assert 0.8 < np.mean(distances) < 1.25
    assert max(distances) < 2


def test_windows_go_to_their_own_domain_and_strangers_are_far(bank):
    for seed in range(1, 20):
        assert [bank.nearest(frames(domain, 16, seed))[0] for domain in (1, 2, 3)] == [1, 2, 3]
        assert bank.nearest(frames(0, 16, seed, 0.0))[0] == 0
        assert bank.nearest(frames(9, 16, seed))[1] > 3


def test_an_entry_that_met_more_frames_knows_its_mean_better(bank):
    entry = bank.entries[1]
    for seed in range(1, 20):
        entry = entry.met(frames(1, 16, seed), "later", now=500)
    truth = np.mean([frames(1, 400, seed).mean(axis=0) for seed in range(50, 54)], axis=0)
    assert np.linalg.norm(entry.mean - truth) < 0.5 * np.linalg.norm(bank.entries[1].mean - truth)
    assert (entry.state, entry.used, entry.frames) == ("later", 500, 16 * 20)
    assert bank.entries[1].state == "in 1"


def test_the_two_closest_are_merged_and_the_better_founded_state_stays(bank):
    near = frames(3, 64, 5) * 0.9 + frames(4, 64, 5) * 0.1
    bank = bank.grown(near / np.linalg.norm(near, axis=1, keepdims=True), "beside 3", now=1000)
    shrunk, told = bank.shrunk(keep=1, now=1000)
    assert told == "merged: domain-3 into domain-4"
    assert [entry.name for entry in shrunk.entries] == [SOURCE, "domain-1", "domain-2", "domain-4"]
    assert shrunk.entries[3].state == "beside 3"
    assert shrunk.entries[3].frames == 80


def test_the_newest_is_left_alone_however_close_it_is_to_another(bank):
    near = frames(3, 16, 5) * 0.9 + frames(4, 16, 5) * 0.1
    bank = bank.grown(near / np.linalg.norm(near, axis=1, keepdims=True), "beside 3", now=1000)
    for _ in range(3):
        newest, (bank, _) = bank.entries[-1], bank.shrunk(keep=len(bank.entries) - 1, now=1000)
        assert bank.entries[-1] is newest
    assert [entry.name for entry in bank.entries] == [SOURCE, "domain-4"]


def test_what_came_once_and_long_ago_is_given_up_first(bank):
    shrunk, told = bank.shrunk(keep=3, now=10_000)
    assert told == "retired: domain-1"
    assert shrunk.place("domain-1") is None
    assert shrunk.entries[0].name == SOURCE


def test_source_is_never_given_up(bank):
    for _ in range(3):
        bank, _ = bank.shrunk(keep=0, now=10_000)
    assert [entry.name for entry in bank.entries] == [SOURCE]


def test_names_are_never_given_twice(bank):
    bank, _ = bank.shrunk(keep=3, now=10_000)
    assert bank.grown(frames(7, 16, 0), None, now=0).entries[-1].name == "domain-4"


@dataclass(frozen=True)
class Learned:
    weights: np.ndarray
    same: np.ndarray


def test_bytes_are_counted_once_for_each_array():
    weights = np.zeros(1000, np.float32)
    assert size(Learned(weights, weights)) == 4000
    assert size({"a": [Learned(weights, weights.copy())]}) == 8000


def test_a_cap_that_is_too_small_for_one_entry_is_refused():
    with pytest.raises(ConfigError, match="one entry takes 4000 bytes"):
        Cap(8, 100).check(Learned(np.zeros(500, np.float32), np.zeros(500, np.float32)))


def test_what_is_usual_is_learned_from_a_domains_own_scores():
    rng = np.random.default_rng(0)
    usual = Usual()
    assert usual.above(np.array([50.0])).tolist() == [0.0]
    for _ in range(40):
        usual = usual.after(rng.normal(-5, 2, 16))
    assert (usual.mean, usual.variance) == (pytest.approx(-5, abs=0.3), pytest.approx(4, rel=0.2))
    assert usual.above(np.array([-5.0, 3.0])) == pytest.approx([0, 4], abs=0.4)
