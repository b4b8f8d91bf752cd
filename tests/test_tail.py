"""The tail in torch and the engine are two forms of one network, whatever the delta."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_adapt.bundle import TAIL
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ArtifactError
from edge_adapt.merge import Merger
from edge_adapt.tail import Tail, batch_statistics, load_program


@pytest.fixture(params=["device_bundle", "reference_bundle"])
def bundle(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def tail(bundle) -> Tail:
    return Tail(bundle)


def deltas(bundle, tail):
    """Source, ports alone, norms alone, everything that is live."""
    rng = np.random.default_rng(0)
    ports = Delta.of_ports(rng.uniform(0.7, 1.4, bundle.channels), rng.normal(0, 0.2, bundle.channels))
    live = {site.name for site in bundle.manifest.sites} | {layer.name for layer in bundle.manifest.layers}

    def moved(names):
        return {
            f"tail/{name}": tail.parameters[name].numpy()
            + rng.normal(0, 0.1, tuple(tail.parameters[name].shape)).astype(np.float32)
            for name in names
        }

    everything = [name for name in tail.parameters if name.rpartition(".")[0] in live]
    norms = moved(tail.norm_parameters)
    return [Delta.source(), ports, Delta(norms), ports | norms, Delta(moved(everything)), ports | moved(everything)]


def test_the_tail_answers_as_the_engine_does(bundle, tail, tiny_frames):
    engine, merge = OnnxRuntimeEngine(bundle), Merger(bundle)
    for delta in deltas(bundle, tail):
        engine.apply(merge(delta))
        seen = engine.observe(tiny_frames, cut=True, taps=False)
        with torch.no_grad():
            found = tail.with_delta(torch.from_numpy(seen.cut), delta).numpy()
        assert np.abs(found - seen.logits).max() < 1e-4 * np.abs(seen.logits).max(), set(delta)


def test_evaluating_leaves_the_source_parameters_alone(bundle, tail, tiny_frames):
    before = {name: value.clone() for name, value in (tail.parameters | tail.buffers).items()}
    cut = torch.from_numpy(OnnxRuntimeEngine(bundle).observe(tiny_frames, cut=True, taps=False).cut)
    for delta in deltas(bundle, tail):
        tail.with_delta(cut, delta)
    tail(cut, norm=batch_statistics)
    assert all(torch.equal(value, before[name]) for name, value in (tail.parameters | tail.buffers).items())


def test_gradients_reach_the_parameters_that_are_given(bundle, tail, tiny_frames):
    cut = torch.from_numpy(OnnxRuntimeEngine(bundle).observe(tiny_frames, cut=True, taps=False).cut)
    values = {name: value.clone().requires_grad_() for name, value in tail.norm_parameters.items()}
    for batch in (False, True):
        norm = batch_statistics if batch else None
        gradients = torch.autograd.grad(tail(cut, values, norm=norm).square().mean(), list(values.values()))
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        assert any(bool(gradient.abs().max() > 0) for gradient in gradients)


def test_batch_statistics_are_those_of_a_module_in_training(reference_bundle, tiny_net, tiny_frames):
    import copy

    net = copy.deepcopy(tiny_net)
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.train()
    x = torch.from_numpy(tiny_frames[:32])
    with torch.no_grad():
        expected = net(x)
        found = Tail(reference_bundle)(x, norm=batch_statistics)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_any_batch(bundle, tail):
    for size in (1, 7):
        assert tail(torch.zeros(size, *bundle.manifest.cut.shape)).shape == (size, 5)


def test_a_tail_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / TAIL).write_bytes(b"PK nothing")
    with pytest.raises(ArtifactError, match=TAIL):
        load_program(tmp_path / TAIL)
