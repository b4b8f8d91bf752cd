"""Another head: fitted to labelled frames, the same every time, and nothing else changes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from edge_adapt.errors import ConfigError, DataError
from edge_adapt.preprocess import Preprocess
from edge_adapt.streams.data import Dataset
from exporters.export import from_module
from exporters.head import fit, with_head


@pytest.fixture
def halves(tiny_net, tiny_data, tiny_frames) -> Dataset:
    """Two classes that a linear layer can tell apart: frames above and below the median of one logit."""
    with torch.no_grad():
        logit = tiny_net(torch.from_numpy(tiny_frames))[:, 0].numpy()
    return Dataset("halves", tiny_data.images, (logit > np.median(logit)).astype(np.int64))


@pytest.fixture(scope="module")
def tiny(tiny_net, device_bundle):
    return from_module(
        tiny_net, "tiny", device_bundle.manifest.input, classes=[str(index) for index in range(5)]
    )


def test_the_head_answers_for_the_new_classes_and_the_rest_stays(tiny_net, halves, tiny, device_bundle):
    made = with_head(tiny, halves, ("low", "high"))
    frames = torch.from_numpy(Preprocess(device_bundle.manifest.input)(halves.images))
    with torch.no_grad():
        answers = made.module(frames).argmax(1).numpy()
    assert (answers == halves.labels).mean() > 0.9
    assert made.classes == ("low", "high")
    assert made.provenance["head"] == "fitted to 128 frames of halves"
    assert tiny_net.head.out_features == 5
    for name, value in tiny_net.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(value, made.module.state_dict()[name]), name


def test_the_same_frames_give_the_same_head(halves, tiny):
    first, second = (with_head(tiny, halves, None) for _ in range(2))
    assert torch.equal(first.module.head.weight, second.module.head.weight)


def test_fit_is_at_a_minimum():
    """The gradient of the penalised loss is zero, by hand, in float64 on standardised features."""
    generator = torch.Generator().manual_seed(0)
    z, labels = torch.randn(60, 4, generator=generator), torch.arange(60) % 3
    z[:, 0] += labels
    head = fit(z, labels, 3)
    standard = (z.double() - z.double().mean(0)) / z.double().std(0)
    weight = head.weight.double() * z.double().std(0)
    errors = torch.softmax(head(z).double(), 1) - torch.nn.functional.one_hot(labels, 3)
    gradient = errors.T @ standard / 60 + 1e-3 * weight
    assert float(gradient.detach().abs().max()) < 1e-4


def test_what_cannot_be_given_a_head_is_refused(halves, tiny):
    model = tiny
    with pytest.raises(DataError, match="no labels"):
        with_head(model, Dataset("bare", halves.images, None), None)
    headless = copy.copy(model)
    object.__setattr__(headless, "module", torch.nn.Sequential(torch.nn.Flatten()))
    with pytest.raises(ConfigError, match="linear layer"):
        with_head(headless, halves, None)
