"""The tail on another device: everything moves there, values and gradients come back, and no memory is no disaster."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_adapt.delta import Delta
from edge_adapt.errors import EngineError
from edge_adapt.far import FarTail, tail_on
from edge_adapt.tail import Tail, batch_statistics


def ports_of(bundle) -> Delta:
    rng = np.random.default_rng(0)
    return Delta.of_ports(rng.uniform(0.8, 1.2, bundle.channels), rng.normal(0, 0.1, bundle.channels))


@pytest.fixture(params=["device_bundle", "reference_bundle", "token_bundle"])
def bundle(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def h(bundle) -> torch.Tensor:
    tokens = (17,) if bundle.manifest.prompts else ()
    return torch.randn(6, *tokens, *bundle.manifest.cut.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", [None, batch_statistics])
def test_nothing_is_left_behind_on_the_cpu(bundle, h, norm):
    """A device without values: an operation that meets a tensor of the CPU there raises."""
    tail = Tail(bundle, device="meta")
    near = {name: value.to("meta") for name, value in Tail(bundle).parameters.items()}
    for ports in (None, ports_of(bundle)):
        logits, features = tail.with_features(h.to("meta"), near, ports=ports, norm=norm)
        assert logits.device.type == features.device.type == "meta"
        assert logits.shape == (6, bundle.manifest.outputs)


@pytest.mark.parametrize("norm", [None, batch_statistics])
@pytest.mark.parametrize("with_ports", [False, True])
def test_values_and_gradients_are_those_of_the_plain_tail(bundle, h, norm, with_ports):
    """There and back again; the device is the CPU here."""
    ports = ports_of(bundle) if with_ports else None
    found = []
    for tail in (Tail(bundle), FarTail(bundle, device="cpu")):
        values = {name: value.clone().requires_grad_() for name, value in tail.norm_parameters.items()}
        logits = tail(h, values, ports=ports, norm=norm)
        logits.logsumexp(1).sum().backward()
        found.append((logits.detach(), {name: value.grad for name, value in values.items()}))
    (plain, gradients), (far, far_gradients) = found
    torch.testing.assert_close(far, plain)
    assert far_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(far_gradients[name], gradient)


def test_hooks_and_norms_of_the_caller_run_beside_the_caller(device_bundle, h_device):
    """They may hold tensors that are on no device."""
    tail = FarTail(device_bundle, device="meta")
    seen = []
    tail(h_device, norm=lambda call: seen.append(call.x.device.type) or batch_statistics(call))
    layer = next(iter(tail.layers))
    tail(h_device, hooks={layer: lambda x, y: seen.append(y.device.type) or y})
    assert set(seen) == {"cpu"}


@pytest.fixture
def h_device(device_bundle) -> torch.Tensor:
    return torch.randn(6, *device_bundle.manifest.cut.shape, generator=torch.Generator().manual_seed(0))


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_one_sentence(device_bundle):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert type(tail_on(device_bundle, "auto")) is type(tail_on(device_bundle)) is Tail
    with pytest.raises(EngineError, match=r"learning on cuda was asked for, and torch .* finds no GPU\n  try: use"):
        tail_on(device_bundle, "cuda")
