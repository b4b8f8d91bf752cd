"""A step as one ONNX graph: the same numbers as eager PyTorch, kept between runs, given up with a reason."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.step import convolution_backward, default_cache
from edge_adapt.errors import ConfigError
from edge_adapt.methods.cotta import CoTTA
from edge_adapt.methods.learner import Lesson
from edge_adapt.methods.protocol import Context
from edge_adapt.methods.tent import Tent
from edge_adapt.tail import Tail, batch_statistics

WINDOW = 4


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def ports(device_bundle: Bundle) -> Delta:
    rng = np.random.default_rng(0)
    channels = device_bundle.channels
    return Delta.of_ports(rng.uniform(0.7, 1.4, channels), rng.normal(0, 0.2, channels))


def lesson(method, ports: Delta, seed: int) -> Lesson:
    bundle, tail = method.tail.bundle, method.tail
    norm = batch_statistics if method.settings.statistics == "batch" else None
    cut = torch.randn(WINDOW, *bundle.manifest.cut.shape, generator=torch.Generator().manual_seed(seed))
    return Lesson(
        frames=np.zeros((WINDOW, 3, 16, 16), np.float32),
        cut=cut,
        tail=lambda h, values: tail(h, values, ports=ports, norm=norm),
        trunk=lambda frames: cut.numpy(),
        ports=ports,
    )


def walked(method, ports: Delta, before=None) -> tuple[dict, dict, torch.Tensor]:
    """Student and second moments after one step from a state that eager steps led to, and the answer before it.

    The very first step of Adam has the size of the rate whatever the gradient: it would compare rounding errors.
    """
    first = before or method
    state = first.init()
    for seed in range(3):
        state = first.learn(state, lesson(first, ports, seed))[0]
    state, logits = method.learn(state, lesson(method, ports, 3))
    return state.student, state.adam.second, logits


SLOW = pytest.mark.slow  # a compilation takes 10 s or so


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (Tent, {"reliable": 0.9}),
        pytest.param(Tent, {"statistics": "batch"}, marks=SLOW),
        pytest.param(CoTTA, {"views": 0}, marks=SLOW),
    ],
)
def test_the_graph_takes_the_step_that_eager_takes(device_bundle, ports, build, settings):
    tail = Tail(device_bundle)
    eager, graph = (
        build(Context(device_bundle, lambda: tail, 0, {"learner": learner, "window": WINDOW, **settings}))
        for learner in ("eager", "graph")
    )
    for expected, found in zip(walked(eager, ports), walked(graph, ports, eager), strict=True):
        if isinstance(expected, torch.Tensor):
            assert torch.allclose(found, expected, atol=1e-5)
            continue
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=1e-5), name
    assert not isinstance(graph._graph, str)


@SLOW
def test_a_compiled_step_is_taken_from_the_cache(device_bundle, ports, monkeypatch):
    tail = Tail(device_bundle)
    context = Context(device_bundle, lambda: tail, 0, {"learner": "graph"})
    first = walked(Tent(context), ports)[0]
    assert len(list(default_cache().glob("*.step"))) == 1
    monkeypatch.setattr("edge_adapt.engines.step.export_step", None)  # compiling again would fail
    second = walked(Tent(context), ports)[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


@SLOW
def test_a_damaged_cache_is_made_anew(device_bundle, ports):
    tail = Tail(device_bundle)
    context = Context(device_bundle, lambda: tail, 0, {"learner": "graph"})
    first = walked(Tent(context), ports)[0]
    (kept,) = default_cache().glob("*.step")
    kept.write_bytes(b"no graph")
    second = walked(Tent(context), ports)[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_cannot_be_compiled_runs_eagerly_and_says_why(device_bundle, ports, caplog):
    tail = Tail(device_bundle)

    class Odd(Tent):
        def _loss(self, logits, given):
            return super()._loss(logits, given) * float(logits.detach().sum())  # a branch on a value

    eager, odd = (
        Odd(Context(device_bundle, lambda: tail, 0, {"learner": learner})) for learner in ("eager", "graph")
    )
    with caplog.at_level(logging.WARNING):
        found = walked(odd, ports)[0]
    expected = walked(eager, ports)[0]
    assert [record for record in caplog.records if "falls back to eager" in record.message]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_unknown_learner_is_refused(device_bundle):
    with pytest.raises(ConfigError, match="learner is 'fast'"):
        Tent(Context(device_bundle, lambda: Tail(device_bundle), 0, {"learner": "fast"}))


@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 1, 1), (2, 1, 1), (2, 0, 1), (1, 1, 4), (2, 1, 4)])
def test_the_backward_pass_of_a_convolution(stride, padding, groups):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 7, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 4 // groups, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    y = torch.conv2d(x, weight, bias, stride, padding, 1, groups)
    gradient = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(y, (x, weight, bias), gradient)
    steps = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, [True] * 3)
    for found, value in zip(convolution_backward(gradient, x, weight, [8], *steps), expected, strict=True):
        assert torch.allclose(found, value)
