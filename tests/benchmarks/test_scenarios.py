"""Scenarios of routing: what comes when, what counts, and that nothing but the seed decides it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks import scenarios
from benchmarks.scenarios import Shift
from benchmarks.scenarios.domains import CLEAN, FEW, RETURNS, STRETCH, VISIT
from benchmarks.scenarios.foreign import POOL, foreign_images, foreign_like
from benchmarks.scenarios.labels import BURST, DRIFT, dirichlet_order
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.streams.corruptions import CORRUPTIONS, corrupt
from edge_adapt.streams.data import Dataset

NEW = {
    *("gradual", "recurring", "clean_return", "mixed_domains", "mixed_domains_correlated", "correlated"),
    "mixed_return",
    *("label_shift", "burst", "contaminated", "contaminated_10", "contaminated_30"),
}
TIME = {"long", "sensor_freeze", "real"}
OLD = {
    *("continual", "reset_each_shift", "natural", "bursts"),
    *(f"long_tailed_{ratio}_{order}" for ratio in (10, 100) for order in ("forward", "uniform", "backward")),
}
TWO = ("dusk", "rain")
EACH = 60
"""Frames of each class."""


@pytest.fixture(scope="module")
def ready() -> Dataset:
    """Ready-made shifts whose frames say their own number, plus 10,000 for the second one; and a clean one."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), EACH))
    images = np.zeros((len(labels), 2, 2, 3), np.uint16)
    images[..., 0] = np.arange(len(labels))[:, None, None]
    shifts = {name: images + np.uint16(10_000 * place) for place, name in enumerate((*TWO, CLEAN))}
    return Dataset("made", None, labels, shifts)


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    """Smooth small images, to be corrupted."""
    rng = np.random.default_rng(0)
    return Dataset("pictures", rng.integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 4)


def played(data: Dataset, name: str, seed: int = 0, corruptions=None, severity: int = 5, foreign=None) -> list[Shift]:
    return list(scenarios.get(name).play(data, severity, seed, corruptions, foreign))


def numbers(shift: Shift) -> np.ndarray:
    """What the frames say: their number, plus 10,000 times the place of their domain."""
    return shift.images[:][:, 0, 0, 0].astype(int)


def test_the_ids_are_for_ever():
    assert set(scenarios.SCENARIOS) == OLD | NEW | TIME


@pytest.mark.parametrize("name", sorted(NEW - {"gradual"}))
def test_the_seed_alone_decides_and_frames_keep_labels_and_domains(ready, name):
    first, again, other = played(ready, name), played(ready, name), played(ready, name, seed=1)
    domains = np.array((*TWO, CLEAN))
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one.images[:], two.images[:])
        assert np.array_equal(one.labels, two.labels)
        count = len(one.images)
        assert len(one.labels) == count
        genuine = np.ones(count, bool) if one.counts is None else one.counts
        said = numbers(one)[genuine]
        assert np.array_equal(ready.labels[said % 10_000], one.labels[genuine])
        truth = np.full(count, one.name) if one.domains is None else one.domains
        assert np.array_equal(domains[said // 10_000], truth[genuine])
    assert any(len(a.images) != len(b.images) or (a.images[:] != b.images[:]).any() for a, b in zip(first, other))  # noqa: B905


def test_slices_of_a_shift_are_its_frames(ready):
    [shift] = played(ready, "mixed_domains")
    whole = shift.images[:]
    assert len(shift.images) == len(whole) == 3 * 10 * EACH
    assert np.array_equal(np.concatenate([shift.images[i : i + 7] for i in range(0, len(whole), 7)]), whole)
    assert all(array is ready.shifts[name] for array, name in zip(shift.images.arrays, (*TWO, CLEAN), strict=True))


def test_recurring_returns_five_times_with_the_same_frames(ready):
    two = dataclasses.replace(ready, shifts={name: ready.shifts[name] for name in TWO})
    shifts = played(two, "recurring")
    assert [shift.name for shift in shifts] == [*TWO] * (RETURNS + 1)
    for name in TWO:
        visits = [numbers(shift) for shift in shifts if shift.name == name]
        assert all(set(visit) == set(visits[0]) for visit in visits)
        fifth = len(visits[0]) // RETURNS
        begins = [frame for visit in visits[1:] for frame in visit[:fifth]]
        assert len(set(begins)) == len(visits[0])  # over the returns, each frame comes early once


def test_recurring_has_few_domains_and_short_visits_unless_more_are_named(pictures):
    many = Dataset("many", np.tile(pictures.images, (20, 1, 1, 1)), np.tile(pictures.labels, 20))
    shifts = played(many, "recurring")
    assert [shift.name for shift in shifts[: len(FEW)]] == list(FEW)
    assert {len(shift.images) for shift in shifts} == {VISIT}
    assert VISIT // RETURNS == 128
    named = played(pictures, "recurring", corruptions=("snow", "frost", "fog", "contrast"))
    assert [shift.name for shift in named[:4]] == ["snow", "frost", "fog", "contrast"]


@pytest.mark.parametrize(("severity", "ramp"), [(5, (1, 2, 3, 4, 5, 4, 3, 2, 1)), (2, (1, 2, 1)), (1, (1,))])
def test_gradual_ramps_up_and_down(pictures, severity, ramp):
    shifts = played(pictures, "gradual", corruptions=("fog", "contrast"), severity=severity)
    assert [shift.name for shift in shifts] == ["fog", "contrast"]
    for shift in shifts:
        expected = {level: corrupt(pictures.images, shift.name, level, seed=0) for level in ramp}
        steps = np.round(np.linspace(0, 40, len(ramp) + 1)).astype(int)
        for level, start, end in zip(ramp, steps, steps[1:], strict=False):
            assert np.array_equal(shift.images[start:end], expected[level][start:end])
        assert np.array_equal(shift.labels, pictures.labels)
    assert len(played(pictures, "gradual")) == len(CORRUPTIONS)


def test_gradual_needs_images_without_corruption(ready):
    with pytest.raises(DataError, match="ready-made shifts"):
        played(ready, "gradual")


def test_clean_return_goes_back_to_clean_frames(ready, pictures):
    assert [shift.name for shift in played(ready, "clean_return")] == [CLEAN, "dusk", CLEAN, "rain", CLEAN]
    shifts = played(pictures, "clean_return", corruptions=("fog",))
    assert [shift.name for shift in shifts] == [CLEAN, "fog", CLEAN]
    stored = {image.tobytes() for image in pictures.images}
    assert all(image.tobytes() in stored for image in shifts[2].images[:])
    assert not any(image.tobytes() in stored for image in shifts[1].images[:])


def test_clean_stretches_are_short_and_of_other_frames(ready):
    labels = np.arange(3 * STRETCH) % 10
    images = np.arange(3 * STRETCH, dtype=np.uint16)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint16)
    data = Dataset("long", None, labels, {"dusk": images, "rain": images, CLEAN: images})
    clean = [numbers(shift) for shift in played(data, "clean_return") if shift.name == CLEAN]
    assert [len(stretch) for stretch in clean] == [STRETCH] * 3
    assert len(set(np.concatenate(clean))) == 3 * STRETCH


def test_clean_return_without_clean_frames_is_refused(ready):
    data = dataclasses.replace(ready, shifts={"dusk": ready.shifts["dusk"]})
    with pytest.raises(DataError, match="no clean frames"):
        played(data, "clean_return")


def test_mixed_domains_hold_every_frame_of_every_domain_in_random_order(ready):
    [shift] = played(ready, "mixed_domains")
    assert len(set(numbers(shift))) == 3 * 10 * EACH
    assert shift.domain_names == sorted((*TWO, CLEAN))
    changes = (shift.domains[1:] != shift.domains[:-1]).mean()
    assert changes == pytest.approx(2 / 3, abs=0.05)
    for name in (*TWO, CLEAN):
        assert (shift.domains[: 5 * EACH] == name).mean() == pytest.approx(1 / 3, abs=0.08)


def test_domains_come_alone_and_then_other_frames_of_all_of_them_mixed(ready):
    *alone, mixed = played(ready, "mixed_return")
    assert [shift.name for shift in alone] == [*TWO, CLEAN]
    assert not set(np.concatenate([numbers(shift) for shift in alone])) & set(numbers(mixed))
    assert len(mixed.images) == pytest.approx(sum(len(shift.images) for shift in alone), abs=3)
    assert (mixed.domains[1:] != mixed.domains[:-1]).mean() == pytest.approx(2 / 3, abs=0.1)


def test_frames_of_several_sizes_cannot_be_mixed():
    shifts = {"a": np.zeros((4, 2, 2, 3), np.uint8), "b": np.zeros((4, 3, 3, 3), np.uint8)}
    with pytest.raises(DataError, match="shapes"):
        played(Dataset("two sizes", None, np.zeros(4, int), shifts), "mixed_domains")


@pytest.mark.parametrize("name", ["correlated", "mixed_domains_correlated"])
def test_correlated_labels_come_in_runs_and_every_frame_once(ready, name):
    for shift in played(ready, name):
        said = numbers(shift)
        assert len(set(said)) == len(said)
        same = (shift.labels[1:] == shift.labels[:-1]).mean()
        assert same > 0.9  # 0.1 in random order
        window = [len(np.unique(shift.labels[start : start + 50])) for start in range(0, len(said) - 50, 50)]
        assert np.median(window) <= 4
        assert np.array_equal(np.sort(shift.labels), np.sort(ready.labels[said % 10_000]))


def test_correlated_within_mixed_domains_keeps_domains_mixed(ready):
    [shift] = played(ready, "mixed_domains_correlated")
    assert (shift.domains[1:] != shift.domains[:-1]).mean() == pytest.approx(2 / 3, abs=0.06)


def test_a_dirichlet_order_differs_between_shifts_and_serves_one_class():
    labels = np.repeat(np.arange(10), 50)
    one, other = (dirichlet_order(labels, np.random.default_rng(seed)) for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert sorted(dirichlet_order(np.zeros(9, int), np.random.default_rng(0)).tolist()) == list(range(9))


def test_label_shift_drifts_through_all_classes(ready):
    many = Dataset("many", None, np.repeat(np.arange(10), 3000), {"dusk": np.zeros((30_000, 1, 1, 1), np.uint8)})
    [shift] = played(many, "label_shift")
    counts = np.stack([np.bincount(part, minlength=10) for part in np.array_split(shift.labels, 20)])
    assert (counts.sum(axis=0) == 3000).all()
    assert len(set(counts.argmax(axis=1))) == 10  # each is the most frequent one at some time
    assert np.median(counts.max(axis=1) / np.maximum(1, counts.min(axis=1))) == pytest.approx(DRIFT**0.9, rel=0.5)
    first, second = played(ready, "label_shift")[:2]
    assert not np.array_equal(first.labels, second.labels)


def test_a_burst_is_one_class_within_a_balanced_stream(ready):
    shifts = played(ready, "burst")
    assert [shift.name for shift in shifts[:6]] == ["dusk", "dusk burst", "dusk", "rain", "rain burst", "rain"]
    before, burst, after = shifts[:3]
    assert len(burst.images) == BURST == 2000
    assert len(set(burst.labels)) == 1
    assert burst.domain_names == ["dusk"]
    assert len(set(numbers(burst))) == EACH
    assert sorted([*numbers(before), *numbers(after)]) == list(range(10 * EACH))
    assert np.bincount(before.labels, minlength=10).min() > EACH // 4
    assert scenarios.get("burst").corruptions == FEW


@pytest.mark.parametrize("percent", [10, 30])
def test_contaminated_is_continual_with_foreign_frames_that_do_not_count(ready, percent):
    for shift, plain in zip(played(ready, f"contaminated_{percent}"), played(ready, "continual"), strict=True):
        assert shift.name == plain.name
        assert np.array_equal(shift.images[:][shift.counts], plain.images)
        assert np.array_equal(shift.labels[shift.counts], plain.labels)
        assert (shift.labels[~shift.counts] == -1).all()
        assert (~shift.counts).mean() == pytest.approx(percent / 100, abs=0.002)
        for part in np.array_split(shift.counts, 4):
            assert (~part).mean() == pytest.approx(percent / 100, abs=0.1)


def test_foreign_frames_are_those_given_made_to_fit(pictures):
    grey = np.full((7, 16, 16), 200, np.uint8)
    shift = played(pictures, "contaminated_30", corruptions=("fog",), foreign=grey)[0]
    foreign = shift.images[:][~shift.counts]
    assert foreign.shape[1:] == (8, 8, 3)
    assert (foreign == 200).all()
    assert len(foreign) == round(40 * 3 / 7)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (12, 20, 3)])
@pytest.mark.parametrize("given", [(5, 6, 4), (5, 6, 4, 1), (5, 6, 4, 3), None])
def test_foreign_frames_take_the_shape_of_the_genuine_ones(shape, given):
    foreign = None if given is None else np.random.default_rng(0).integers(0, 256, given, np.uint8)
    made = foreign_like(np.zeros((3, *shape), np.uint8), foreign, np.random.default_rng(0))
    assert made.shape == (POOL if given is None else 5, *shape)
    assert made.dtype == np.uint8
    assert made.std() > 20


def test_noise_for_frames_that_are_no_images_has_their_mean_and_spread():
    windows = np.random.default_rng(1).normal(3, 2, (50, 9, 128)).astype(np.float32)
    noise = foreign_like(windows, None, np.random.default_rng(0))
    assert noise.dtype == np.float32
    assert noise.mean() == pytest.approx(3, abs=0.1)
    assert noise.std() == pytest.approx(2, abs=0.1)
    with pytest.raises(DataError, match="leave --foreign out"):
        foreign_like(windows, np.zeros((3, 8, 8), np.uint8), np.random.default_rng(0))


def test_all_arrays_of_an_archive_are_foreign_as_far_as_they_are_of_one_size():
    shifts = {"a": np.zeros((3, 16, 16)), "b": np.zeros((4, 28, 28)), "c": np.ones((5, 16, 16))}
    assert foreign_images(Dataset("digits", None, None, shifts)).shape == (8, 16, 16)
    assert foreign_images(Dataset("images", shifts["b"], None)).shape == (4, 28, 28)


def test_foreign_frames_without_use_for_them_are_refused(pictures):
    with pytest.raises(ConfigError, match="mixes no foreign frames in"):
        played(pictures, "continual", foreign=np.zeros((3, 8, 8), np.uint8))


@pytest.mark.parametrize("name", ["correlated", "mixed_domains_correlated", "label_shift", "burst"])
def test_without_labels_they_are_refused(ready, name):
    with pytest.raises(DataError, match="has no labels"):
        played(dataclasses.replace(ready, labels=None), name)


@pytest.mark.parametrize("name", ["recurring", "clean_return", "mixed_domains", "contaminated_10"])
def test_the_others_need_none(ready, name):
    assert all(shift.labels is None for shift in played(dataclasses.replace(ready, labels=None), name))
