"""Adapter files: what is saved comes back, and anything else is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from edge_adapt.adapters.bottleneck import Bottleneck
from edge_adapt.adapters.lora import LoRA
from edge_adapt.adapters.one_bit import pack, size_bytes, unpack
from edge_adapt.adapters.prompt import Prompt
from edge_adapt.adapters.protocol import places
from edge_adapt.adapters.ssf import SSF
from edge_adapt.adapters.storage import load, save
from edge_adapt.adapters.vida import VidaPair
from edge_adapt.errors import ArtifactError, StateError
from edge_adapt.tail import Tail


def drawn(adapter):
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=draw) for name, value in adapter.init(draw).items()}


def every(tail):
    made = [
        LoRA(places(tail), rank=2, scale=0.5),
        VidaPair(places(tail), low=1, high=3).scaled(0.75, 1.25),
        SSF(places(tail, norms=True, depthwise=True)),
        Bottleneck(places(tail, depthwise=True), rank=2),
    ]
    return [*made, Prompt.at(tail, count=2)] if tail.bundle.manifest.prompts else made


def test_what_is_saved_comes_back(tail, tmp_path):
    for adapter in every(tail):
        values, path = drawn(adapter), tmp_path / f"{adapter.kind}.safetensors"
        save(path, adapter, values, tail.bundle)
        found, again = load(path, tail)
        assert found == adapter
        assert again.keys() == values.keys()
        assert all(torch.equal(again[name], values[name]) for name in values)


def test_one_bit_files_hold_signs(tail, tmp_path):
    for adapter in every(tail):
        values, path = drawn(adapter), tmp_path / f"{adapter.kind}.safetensors"
        save(path, adapter, values, tail.bundle, bits=1)
        found, again = load(path, tail)
        assert found == adapter
        for name, value in values.items():
            expected = value.numpy() if value.ndim < 2 else unpack(pack(value.numpy()))
            assert np.array_equal(again[name].numpy(), expected)
        numbers = sum(array.nbytes for array in load_file(path).values())
        assert numbers == size_bytes({name: value.numpy() for name, value in values.items()}, bits=1)


@pytest.fixture
def saved(device_bundle, tmp_path):
    """A tail, and the file of an adapter on it."""
    tail = Tail(device_bundle)
    adapter = LoRA(places(tail), rank=2)
    save(tmp_path / "lora.safetensors", adapter, drawn(adapter), device_bundle)
    return tail, tmp_path / "lora.safetensors"


def rewritten(path, change, **facts):
    """The same file with other tensors, or other facts about them."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        old = file.metadata()
    save_file(change(load_file(path)), path, metadata={**old, **facts})


def test_a_damaged_file_is_named(saved):
    tail, path = saved
    data = path.read_bytes()
    for broken in (data[:-5], b"", b"nothing of the kind", data[:4] + b"\xff" * 8 + data[12:]):
        path.write_bytes(broken)
        with pytest.raises(ArtifactError, match=r"lora\.safetensors"):
            load(path, tail)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"lora\.safetensors"):
        load(path, tail)


def test_a_file_of_another_tail_is_refused(saved, reference_bundle):
    _, path = saved
    with pytest.raises(StateError, match="belongs to tail"):
        load(path, Tail(reference_bundle))


@pytest.mark.parametrize("facts", [{"kind": "future"}, {"schema": "2"}])
def test_a_file_that_is_no_known_adapter_is_refused(saved, facts):
    tail, path = saved
    rewritten(path, dict, **facts)
    with pytest.raises(ArtifactError, match="no adapter that this version reads"):
        load(path, tail)


def test_a_file_that_contradicts_itself_is_refused(saved):
    tail, path = saved
    good = path.read_bytes()
    name = "adapter/point/up"

    def without(tensors):
        return {key: value for key, value in tensors.items() if key != name}

    def narrow(tensors):
        return {**tensors, name: tensors[name][:, :1].copy()}

    def endless(tensors):
        return {**tensors, name: np.full_like(tensors[name], np.inf)}

    def elsewhere(tensors):
        return {key.replace("point", "paint"): value for key, value in tensors.items()}

    for change, match in ((without, name), (narrow, name), (endless, name), (elsewhere, "paint")):
        path.write_bytes(good)
        rewritten(path, change)
        with pytest.raises(ArtifactError, match=match):
            load(path, tail)
    wrong = (("settings", "{"), ("settings", '{"rang": 2}'), ("settings", '{"rank": 0}'), ("packed", '{"x": 1}'))
    for fact, text in wrong:
        path.write_bytes(good)
        rewritten(path, dict, **{fact: text})
        with pytest.raises(ArtifactError, match="does not fit its own description"):
            load(path, tail)
