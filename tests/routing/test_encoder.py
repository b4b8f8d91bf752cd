"""The hyperdimensional encoder on synthetic Gaussians."""

from __future__ import annotations

import numpy as np
import pytest

from edge_adapt.errors import ConfigError, DataError
from edge_adapt.routing.encoder import Encoder, descriptors, domain_descriptor, familiarity, ood_score, unit

SIZES = (16, 32, 64)
CLASSES = 5


def domain(frames: int, seed: int, *, of: int = 0):
    """Taps [N, channels] of five classes and their labels: correlated Gaussians about a centre for each class."""
    facts = np.random.default_rng([7, of])
    width = sum(SIZES)
    centres = facts.normal(0, 0.6, (CLASSES, width))
    mixing = facts.normal(0, 1 / np.sqrt(8), (8, width)) * 0.5
    shift = facts.normal(0, 0.5, width) * (of > 0)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, frames)
    mean = centres[labels] + rng.normal(size=(frames, 8)) @ mixing + rng.normal(0, 0.2, (frames, width)) + shift
    return (mean, np.square(mean) + np.exp(rng.normal(0, 0.1, (frames, width)))), labels


def shuffled(taps, seed: int):
    """The same numbers in each frame, in another order: what noise of the same size would give."""
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(taps[0].shape[1]) for _ in taps[0]])
    return tuple(np.take_along_axis(part, order, axis=1) for part in taps)


def auroc(usual: np.ndarray, strange: np.ndarray) -> float:
    return float((strange[:, None] > usual[None]).mean())


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.fitted(domain(500, 0)[0], SIZES)


def test_strangers_score_higher_than_the_same_domain(encoder):
    """Conformance 13, first half: AUROC above 0.9 against shuffled noise."""
    taps, labels = domain(500, 0)
    known = descriptors(encoder(taps), labels, CLASSES)
    fresh, _ = domain(300, 1)
    usual, strange = ood_score(encoder(fresh), known), ood_score(encoder(shuffled(fresh, 2)), known)
    assert auroc(usual, strange) > 0.9


def test_routing_is_stable_under_one_batch_more_or_less(encoder):
    """Conformance 13, second half: the nearest domain of a batch stays the nearest with a batch more or less."""
    entries = []
    for of in range(4):
        taps, labels = domain(300, 3, of=of)
        entries.append(descriptors(encoder(taps), labels, CLASSES))
    for of in range(4):
        batches = [encoder(domain(16, 100 + index, of=of)[0]) for index in range(3)]
        for some in (batches[:1], batches[:2], batches):
            scores = [familiarity(np.concatenate(some), known).mean() for known in entries]
            assert int(np.argmax(scores)) == of


def test_domains_away_from_source_have_directions_of_their_own(encoder):
    known = np.stack([domain_descriptor(encoder(domain(300, 3, of=of)[0])) for of in range(1, 4)])
    for index in range(3):
        assert int((domain_descriptor(encoder(domain(16, 200, of=index + 1)[0])) @ known.T).argmax()) == index


def test_a_class_is_nearest_to_its_own_descriptor(encoder):
    taps, labels = domain(500, 0)
    known = descriptors(encoder(taps), labels, CLASSES)
    fresh, expected = domain(200, 4)
    assert ((encoder(fresh) @ known.T).argmax(axis=1) == expected).mean() > 0.9


def test_projections_keep_lengths_and_layers_do_not_mix(encoder):
    for size, projection in zip(encoder.chosen, encoder.projections, strict=True):
        assert projection.shape == (2 * size, encoder.width)
        assert projection @ projection.T == pytest.approx(np.eye(2 * size), abs=1e-5)
    assert np.abs(encoder.projections[0] @ encoder.projections[1].T).max() < 0.2


def test_the_seed_says_everything(encoder):
    taps, _ = domain(10, 5)
    again = Encoder(SIZES, encoder.mean, encoder.spread)
    other = Encoder(SIZES, encoder.mean, encoder.spread, seed=1)
    assert np.array_equal(encoder(taps), again(taps))
    assert not np.allclose(encoder(taps), other(taps))


def test_every_layer_counts_alike(encoder):
    """A layer whose numbers are a hundred times larger says no more than before."""
    taps, _ = domain(4, 6)
    deviation = np.sqrt(taps[1] - np.square(taps[0]))
    mean = taps[0].copy()
    mean[:, :16] = encoder.mean[0, :16] + 100 * (mean[:, :16] - encoder.mean[0, :16])
    loud = encoder((mean, np.square(mean) + np.square(deviation)))
    one = encoder.projections[0]
    share = np.linalg.norm(loud @ one.T, axis=1)
    assert share.max() < 0.8


def test_what_no_frame_has_is_no_descriptor():
    known = descriptors(unit(np.ones((2, 8))), np.array([0, 0]), 3)
    assert known[0] == pytest.approx(np.full(8, 1 / np.sqrt(8)))
    assert not known[1:].any()
    assert familiarity(unit(np.ones((1, 8))), known) == pytest.approx([1])


def test_taps_of_another_network_are_refused(encoder):
    with pytest.raises(DataError, match="7 channels"):
        encoder((np.zeros((1, 7)), np.ones((1, 7))))
    with pytest.raises(ConfigError, match="width is 16"):
        Encoder(SIZES, encoder.mean, encoder.spread, width=16)
