"""The hypernetwork of the label shift adapter: its loss, where it starts, and what it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Generator
from torch.nn.functional import cross_entropy

from edge_adapt.adapters.label_shift import LabelShiftNet
from edge_adapt.errors import DataError
from exporters.label_shift import (
    HARD,
    drawn_priors,
    fitted_temperature,
    gla_loss,
    initial,
    mixed,
    train_label_shift,
)

CLASSES, WIDTH = 4, 12
UNIFORM = np.full(CLASSES, 1 / CLASSES)
LONG_TAILED = np.array([0.6, 0.25, 0.1, 0.05])
PRIOR = np.array([0.85, 0.08, 0.05, 0.02])
MEANS = 2.5 * np.eye(CLASSES, WIDTH)
HEAD = (2.5 * MEANS, np.zeros(CLASSES))
"""Far too sure: 2.5 times what Bayes says."""


def samples(count: int, prior: np.ndarray, seed: int = 0, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.choice(CLASSES, count, p=prior)
    return MEANS[labels] + spread * rng.normal(size=(count, WIDTH)), labels


def error(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float((logits.argmax(1) != labels).mean())


@pytest.mark.parametrize("source", [UNIFORM, LONG_TAILED])
def test_it_starts_as_the_source_model(source):
    """Conformance 14: outputs that are 0 give source logits for any prior."""
    values = initial(CLASSES, WIDTH, source, Generator().manual_seed(0))
    net = LabelShiftNet({name: value.numpy() for name, value in values.items()}, HEAD[0], source, 1.0)
    for prior in (UNIFORM, LONG_TAILED, PRIOR):
        assert not net.change(samples(3, UNIFORM)[0], prior).any()


def test_the_loss_is_cross_entropy_for_the_source_prior():
    """Conformance 14; and by hand for another."""
    logits, labels = torch.randn(5, CLASSES, generator=Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])
    same = np.repeat(LONG_TAILED[None], 5, axis=0)
    assert float(gla_loss(logits, labels, same, LONG_TAILED)) == pytest.approx(float(cross_entropy(logits, labels)))
    other = np.repeat(PRIOR[None], 5, axis=0)
    p = softmax(logits.numpy() + np.log(LONG_TAILED) - np.log(PRIOR), axis=1)
    expected = -np.log(p[np.arange(5), labels]).mean()
    assert float(gla_loss(logits, labels, other, LONG_TAILED)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("source", [UNIFORM, LONG_TAILED])
def test_priors_are_distributions_of_many_kinds(source):
    made = drawn_priors(source, 2000, np.random.default_rng(0))
    np.testing.assert_allclose(made.sum(axis=1), 1)
    assert made.min() > 0
    assert made.max() > source.max() + 0.1
    assert (np.abs(made - UNIFORM).max(axis=1) < 0.1).any()


def test_features_are_mixed_until_the_head_errs_as_it_will():
    """Those of training images hardly ever do, and would teach that no correction is needed."""
    z, labels = samples(4000, UNIFORM, spread=0.3)
    assert error(z @ HEAD[0].T, labels) < 1
    hard = mixed(z, labels, HEAD, np.random.default_rng(0))
    assert error(hard @ HEAD[0].T, labels) == pytest.approx(100 * HARD, abs=1.5)
    assert fitted_temperature(hard @ HEAD[0].T, labels) > fitted_temperature(z @ HEAD[0].T, labels)


def test_features_that_are_hard_already_stay_as_they_are():
    z, labels = samples(1000, UNIFORM, spread=4.0)
    np.testing.assert_allclose(mixed(z, labels, HEAD, np.random.default_rng(0)), z, atol=0.15)


def test_a_temperature_makes_certainty_right():
    z, labels = samples(20000, UNIFORM)
    assert fitted_temperature(z @ MEANS.T, labels) == 1
    assert fitted_temperature(2.5 * z @ MEANS.T, labels) == pytest.approx(2.5, abs=0.25)


@pytest.mark.parametrize("prior", [PRIOR, PRIOR[::-1], UNIFORM])
def test_what_it_learns_comes_near_bayes(prior):
    train, test = samples(3000, UNIFORM), samples(20000, prior, seed=1)
    net = train_label_shift(*train, HEAD, steps=400)
    plain = test[0] @ HEAD[0].T
    # Equal covariances: log p(x | y) is z mu_y - |mu_y|^2 / 2, and all |mu_y| are the same here.
    best = error(test[0] @ MEANS.T + np.log(prior), test[1])
    found = error(plain + net.change(test[0], prior), test[1])
    assert found <= best + 0.35 * (error(plain, test[1]) - best) + 0.4


def test_an_unbalanced_source_is_corrected_by_its_degree():
    train, test = samples(3000, LONG_TAILED), samples(20000, LONG_TAILED[::-1], seed=1)
    head = (HEAD[0], HEAD[1] + 2.5 * np.log(LONG_TAILED))
    net = train_label_shift(*train, head, steps=400)
    assert net.values["hidden.weight"].shape[1] == 1
    plain = test[0] @ head[0].T + head[1]
    best = error(test[0] @ MEANS.T + np.log(LONG_TAILED[::-1]), test[1])
    found = error(plain + net.change(test[0], LONG_TAILED[::-1]), test[1])
    assert found < (best + error(plain, test[1])) / 2


def test_the_same_seed_gives_the_same_network_and_progress_is_told():
    told = []
    train = samples(400, UNIFORM)
    first = train_label_shift(*train, HEAD, steps=60, progress=lambda done, total: told.append((done, total)))
    again, other = train_label_shift(*train, HEAD, steps=60), train_label_shift(*train, HEAD, steps=60, seed=1)
    assert told[0] == (0, 60)
    assert told[-1] == (60, 60)
    for name, value in first.values.items():
        assert np.array_equal(value, again.values[name])
    assert not np.array_equal(first.values["left"], other.values["left"])


@pytest.mark.parametrize("harm", ["nan", "missing class", "length"])
def test_data_that_cannot_teach_are_refused(harm):
    z, labels = samples(100, UNIFORM)
    if harm == "nan":
        z[0, 0] = np.nan
    if harm == "missing class":
        labels[labels == 2] = 0
    if harm == "length":
        labels = labels[:-1]
    with pytest.raises(DataError):
        train_label_shift(z, labels, HEAD)
