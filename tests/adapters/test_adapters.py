"""Adapters: the identity at the start, merged as unmerged, gradients, and the weights of every kind of layer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional

from edge_adapt.adapters.bottleneck import Bottleneck, middles
from edge_adapt.adapters.conv import ConvAdapter, around
from edge_adapt.adapters.lora import LoRA
from edge_adapt.adapters.prompt import TOKENS, Prompt
from edge_adapt.adapters.protocol import Place, merged, places
from edge_adapt.adapters.ssf import SSF
from edge_adapt.adapters.vida import VidaPair
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.merge import Merger
from edge_adapt.tail import Tail

TOLERANCE = 1e-5
"""Of the largest logit; two orders of float32 sums."""


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def convolutions(tail) -> tuple[Place, ...]:
    found = [place for place in places(tail) if place.kind == "conv"]
    if not found:
        pytest.skip("this tail has no convolution")
    return tuple(found)


def every(tail):
    """One adapter of each kind that the tail can carry."""
    made = [
        LoRA(places(tail), rank=3, scale=0.7),
        VidaPair(places(tail), low=1, high=6),
        SSF(places(tail, norms=True, depthwise=True)),
        Bottleneck(places(tail), rank=3),
    ]
    kinds = {place.kind for place in places(tail)}
    if "conv" in kinds:
        made += [ConvAdapter(convolutions(tail), rank=2), ConvAdapter(convolutions(tail), rank=2, kernel="whole")]
    return made


def moved(adapter, seed: int = 5) -> dict[str, Tensor]:
    """Values as learning might leave them."""
    draw = generator(seed)
    return {
        name: value + 0.2 * torch.randn(value.shape, generator=draw) for name, value in adapter.init(draw).items()
    }


def answer(tail, h, adapter, values) -> Tensor:
    hooks = adapter.hooks(values)
    return tail(adapter.cut(values, h), adapter.weights(values, tail.parameters), hooks=hooks)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def low_rank_beside(place: Place, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
    """U D x, computed as two layers behind each other."""
    if place.kind != "conv":
        return x @ down.T @ up.T
    narrow = functional.conv2d(x, down, stride=place.stride, padding=place.padding)
    return functional.conv2d(narrow, up[:, :, None, None])


def test_the_start_is_the_identity(tail, h):
    source = tail(h)
    for adapter in every(tail):
        values = adapter.init(generator())
        assert_close(answer(tail, h, adapter, values), source, 1e-6)


def test_names_say_where_a_tensor_belongs(tail):
    for adapter in every(tail):
        for name in adapter.init(generator()):
            prefix, layer, tensor = name.split("/")
            assert prefix == "adapter"
            assert f"{layer}.weight" in tail.parameters
            assert "." not in tensor


def test_the_same_seed_draws_the_same(tail):
    for adapter in every(tail):
        first, second, other = (adapter.init(generator(seed)) for seed in (0, 0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first)
        if adapter.kind != "ssf":
            assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_low_rank_pair_merged_answers_as_beside_the_layer(tail, h):
    adapter = LoRA(places(tail), rank=3, scale=0.7)
    values = moved(adapter)

    def beside(place):
        down, up = values[place.tensor("down")], values[place.tensor("up")]
        return lambda x, y: y + 0.7 * low_rank_beside(place, down, up, x)

    expected = tail(h, hooks={place.name: beside(place) for place in adapter.places})
    assert not torch.allclose(expected, tail(h), atol=1e-2)
    assert_close(answer(tail, h, adapter, values), expected)


def test_a_vida_pair_merged_answers_as_beside_the_layer(tail, h):
    """Conformance 15, ViDA: y = Wx + b + s_low U1 D1 x + s_high U2 D2 x."""
    adapter = VidaPair(places(tail), low=1, high=6).scaled(0.6, 1.4)
    values = moved(adapter)

    def beside(place):
        parts = [
            (scale, values[place.tensor(f"down_{role}")], values[place.tensor(f"up_{role}")])
            for role, scale in (("low", 0.6), ("high", 1.4))
        ]
        return lambda x, y: y + sum(scale * low_rank_beside(place, down, up, x) for scale, down, up in parts)

    expected = tail(h, hooks={place.name: beside(place) for place in adapter.places})
    assert not torch.allclose(expected, tail(h), atol=1e-2)
    assert_close(answer(tail, h, adapter, values), expected)


def test_ssf_merged_answers_as_behind_the_layer(tail, h):
    """Conformance 15, SSF: gamma y + beta behind every layer; hooks reach layers, so norms are left out."""
    adapter = SSF(places(tail, depthwise=True))
    values = moved(adapter)

    def behind(place):
        scale, shift = values[place.tensor("scale")], values.get(place.tensor("shift"))

        def hook(x, y):
            # A matrix product hands on its sum with a bias that is no parameter, and that stays as it is.
            bias = tail.buffers.get(f"{place.name}.bias", 0) if place.kind == "matmul" else 0
            shape = (-1, 1, 1) if place.kind == "conv" else (-1,)
            scaled = scale.reshape(shape) * (y - bias) + bias
            return scaled if shift is None else scaled + shift.reshape(shape)

        return hook

    expected = tail(h, hooks={place.name: behind(place) for place in adapter.places})
    assert not torch.allclose(expected, tail(h), atol=1e-2)
    assert_close(answer(tail, h, adapter, values), expected)


def test_ssf_on_a_norm_is_its_affine_scaled_and_shifted(tail, h):
    adapter = SSF(tuple(place for place in places(tail, norms=True) if place.kind == "norm"))
    values = moved(adapter)
    found = adapter.weights(values, tail.parameters)
    assert found.keys() == tail.norm_parameters.keys()
    for place in adapter.places:
        scale, shift = values[place.tensor("scale")], values[place.tensor("shift")]
        weight, bias = (tail.parameters[f"{place.name}.{role}"] for role in ("weight", "bias"))
        x = torch.randn(3, len(weight), generator=generator())
        expected = scale * (weight * x + bias) + shift
        assert_close(found[f"{place.name}.weight"] * x + found[f"{place.name}.bias"], expected)


@pytest.mark.parametrize("kernel", ["point", "whole"])
def test_a_conv_adapter_merged_answers_as_beside_the_layer(tail, h, kernel):
    adapter = ConvAdapter(convolutions(tail), rank=2, kernel=kernel)
    values = moved(adapter)

    def beside(place):
        down, up = values[place.tensor("down")], values[place.tensor("up")]

        def hook(x, y):
            if kernel == "whole":
                return y + low_rank_beside(place, down, up, x)
            narrow = functional.conv2d(x, down[:, :, None, None], stride=place.stride)  # no padding: a point
            return y + functional.conv2d(narrow, up[:, :, None, None])

        return hook

    expected = tail(h, hooks={place.name: beside(place) for place in adapter.places})
    assert not torch.allclose(expected, tail(h), atol=1e-3)
    assert_close(answer(tail, h, adapter, values), expected)


def test_a_bottleneck_adds_its_own_network(tail, h):
    adapter = Bottleneck(places(tail), rank=3)
    values = moved(adapter)

    def beside(place):
        down, down_bias, up, up_bias, scale = (
            values[place.tensor(name)] for name in ("down", "down_bias", "up", "up_bias", "scale")
        )

        def hook(x, y):
            if place.kind != "conv":
                return y + scale * (functional.gelu(x @ down.T + down_bias) @ up.T + up_bias)
            narrow = functional.gelu(functional.conv2d(x, down[:, :, None, None], down_bias, stride=place.stride))
            return y + scale * functional.conv2d(narrow, up[:, :, None, None], up_bias)

        return hook

    expected = tail(h, hooks={place.name: beside(place) for place in adapter.places})
    assert not torch.allclose(expected, tail(h), atol=1e-2)
    assert_close(answer(tail, h, adapter, values), expected)


def test_merged_adapters_answer_in_the_engine(bundle, tail):
    shape = bundle.manifest.input.shape
    frames = np.random.default_rng(2).normal(size=(6, *shape)).astype(np.float32)
    engine, merge = OnnxRuntimeEngine(bundle), Merger(bundle)
    alive = set(places(tail, live=True, norms=True, depthwise=True))
    for whole in every(tail):
        if whole.kind == "bottleneck":
            continue
        adapter = dataclasses.replace(whole, places=tuple(place for place in whole.places if place in alive))
        values = moved(adapter)
        engine.apply(merge(merged(adapter, values, tail.parameters)))
        seen = engine.observe(frames, cut=True, taps=False)
        with torch.no_grad():
            expected = answer(tail, torch.tensor(seen.cut), adapter, values)
        assert_close(torch.tensor(seen.logits), expected, 1e-4)  # the engine folds norms into its weights


def test_gradients_reach_every_tensor(tail, h):
    """With U = 0 only U has a gradient; once it moved, every tensor has one."""
    for adapter in every(tail):
        for values in (adapter.init(generator()), moved(adapter)):
            leaves = {name: value.requires_grad_() for name, value in values.items()}
            loss = answer(tail, h, adapter, leaves).logsumexp(1).mean()
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            still = {name for name, value in zip(leaves, found, strict=True) if value is None or not value.any()}
            ups = {name for name in leaves if name.rpartition("/")[2].startswith(("up", "shift"))}
            assert not still & ups
        assert not {name for name in still if not name.endswith("up_bias")}


def test_down_of_the_vida_pair_has_the_spread_of_the_paper():
    place = Place("layer", "linear", (400, 500))
    values = VidaPair((place,), low=1, high=16).init(generator())
    for role, rank in (("low", 1), ("high", 16)):
        assert values[f"adapter/layer/down_{role}"].std() == pytest.approx(1 / rank**2, rel=0.1)
        assert not values[f"adapter/layer/up_{role}"].any()


def test_ssf_starts_exactly_at_one_and_zero(tail):
    values = SSF(places(tail, norms=True)).init(generator())
    assert all(bool((value == 1).all()) for name, value in values.items() if name.endswith("/scale"))
    assert all(bool((value == 0).all()) for name, value in values.items() if name.endswith("/shift"))


def test_a_low_rank_change_of_a_grouped_convolution_is_shared_by_its_groups():
    place = Place("layer", "conv", (6, 2, 3, 3), groups=2, stride=(2, 2), padding=(1, 1))
    x, down, up = (torch.randn(shape, generator=generator()) for shape in ((3, 4, 7, 7), (5, 2, 3, 3), (6, 5)))
    found = functional.conv2d(x, place.low_rank(down, up), stride=2, padding=1, groups=2)
    for group in range(2):
        narrow = functional.conv2d(x[:, 2 * group : 2 * group + 2], down, stride=2, padding=1)
        rows = slice(3 * group, 3 * group + 3)
        assert_close(found[:, rows], functional.conv2d(narrow, up[rows, :, None, None]))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 0), (3, 2, 1), (5, 2, 1), (4, 2, 1), (1, 2, 0)])
def test_the_middle_of_a_kernel_is_found_for_any_stride_and_padding(kernel, stride, padding):
    place = Place("layer", "conv", (6, 4, kernel, kernel), stride=(stride,) * 2, padding=(padding,) * 2)
    x, point = torch.randn(2, 4, 9, 8, generator=generator()), torch.randn(6, 4, generator=generator())
    expected = functional.conv2d(x, around(place, point), stride=stride, padding=padding)
    found = (middles(place, x) @ point.T).movedim(-1, 1)
    assert found.shape == expected.shape
    assert_close(found, expected)


def test_depthwise_convolutions_are_left_out_unless_asked_for(device_bundle):
    tail = Tail(device_bundle)
    assert [place.name for place in places(tail)] == ["point", "head"]
    assert [place.name for place in places(tail, depthwise=True)] == ["depthwise", "point", "head"]
    assert [place.name for place in places(tail, names=["depthwise"])] == ["depthwise"]
    with pytest.raises(ConfigError, match="no layer 'heat'") as caught:
        places(tail, names=["heat"])
    assert "head" in caught.value.remedy


def test_what_is_not_linear_is_not_merged(tail):
    adapter = Bottleneck(places(tail))
    with pytest.raises(ConfigError, match="bottleneck"):
        merged(adapter, adapter.init(generator()), tail.parameters)


def test_prompts_stand_behind_the_class_token(token_bundle, device_bundle):
    tail = Tail(token_bundle)
    adapter = Prompt.at(tail, count=3)
    values = adapter.init(generator())
    h = torch.randn(2, 17, 16, generator=generator())
    prompted = adapter.cut(values, h)
    assert prompted.shape == (2, 20, 16)
    assert torch.equal(prompted[:, 0], h[:, 0])
    assert torch.equal(prompted[1, 1:4], values[TOKENS])
    assert torch.equal(prompted[:, 4:], h[:, 1:])
    assert not torch.allclose(tail(prompted), tail(h), atol=1e-3)
    leaf = values[TOKENS].requires_grad_()
    (gradient,) = torch.autograd.grad(tail(adapter.cut({TOKENS: leaf}, h)).square().sum(), leaf)
    assert bool(gradient.any(1).all())
    with pytest.raises(ConfigError, match="no token sequence"):
        Prompt.at(Tail(device_bundle))


def test_a_conv_adapter_is_refused_on_another_layer(device_bundle):
    with pytest.raises(ConfigError, match="head is no convolution"):
        ConvAdapter(places(Tail(device_bundle)))


@pytest.mark.parametrize("make", [lambda: LoRA(rank=0), lambda: VidaPair(high=0), lambda: Bottleneck(rank=-1)])
def test_a_rank_is_positive(make):
    with pytest.raises(ConfigError, match="expected 1 or more"):
        make()
