"""Weights edited in place: the same answers as a rebuilt session and as torch, nothing rebuilt, never a mixture."""

from __future__ import annotations

import itertools
import threading
import warnings

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.live import BLOCKS, Layout, find_layout
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.engines.torch import TorchEngine
from edge_adapt.errors import EngineError, StateError
from edge_adapt.merge import Merger
from edge_adapt.tail import Tail


def distance(found, expected) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def random_delta(bundle: Bundle, seed: int) -> Delta:
    """Ports of every site, and every tail parameter that an engine can change: norms, convolutions, the head."""
    rng = np.random.default_rng(seed)
    delta = Delta.of_ports(rng.uniform(0.7, 1.4, bundle.channels), rng.normal(0, 0.2, bundle.channels))
    live = {site.name for site in bundle.manifest.sites} | {layer.name for layer in bundle.manifest.layers}
    tail = {}
    for name, value in Tail(bundle).parameters.items():
        owner, _, role = name.rpartition(".")
        if owner in live and role in ("weight", "bias"):
            noise = rng.normal(0, 0.1, tuple(value.shape)).astype(np.float32)
            tail[f"tail/{name}"] = value.numpy() * rng.uniform(0.8, 1.2) + noise
    return delta | tail


@pytest.fixture(params=["device_bundle", "reference_bundle"])
def bundle(request) -> Bundle:
    return request.getfixturevalue(request.param)


@pytest.fixture
def merge(bundle) -> Merger:
    return Merger(bundle)


def test_the_random_deltas_of_this_file_change_every_kind_of_parameter(bundle):
    tail = random_delta(bundle, 0).tail
    assert {"depthwise.weight", "point.weight", "head.weight", "head.bias", "alone.weight", "alone.bias"} <= tail.keys()
    if bundle.is_reference:
        assert {"stem.0.weight", "stem.0.bias", "stem.1.weight", "block.conv.weight"} <= tail.keys()


def test_live_rebuilt_and_torch_answer_alike(bundle, merge, tiny_frames):
    live, rebuilt, plain = OnnxRuntimeEngine(bundle), OnnxRuntimeEngine(bundle, live=False), TorchEngine(bundle)
    assert live.is_live
    assert not rebuilt.is_live
    source = live.run(tiny_frames)
    for seed in range(5):
        update = merge(random_delta(bundle, seed))
        for engine in (live, rebuilt, plain):
            engine.apply(update)
        found = live.run(tiny_frames)
        assert distance(found, rebuilt.run(tiny_frames)) < 1e-5
        assert distance(found, plain.run(tiny_frames)) < 1e-5
        assert distance(found, source) > 1e-2


def test_parts_of_a_delta_leave_the_rest_at_source(bundle, merge, tiny_frames):
    """A later, smaller delta must not inherit anything from an earlier, larger one."""
    live = OnnxRuntimeEngine(bundle)
    whole = random_delta(bundle, 1)
    rebuilt = OnnxRuntimeEngine(bundle, live=False)
    for name in whole:
        live.apply(merge(whole))
        for engine in (live, rebuilt):
            engine.apply(merge(Delta({name: whole[name]})))
        assert distance(live.run(tiny_frames[:9]), rebuilt.run(tiny_frames[:9])) < 1e-5, name


def test_a_change_builds_no_session(bundle, merge, tiny_frames, monkeypatch):
    engine = OnnxRuntimeEngine(bundle)
    for seed in (0, 1):  # both banks have been made
        engine.apply(merge(random_delta(bundle, seed)))
        engine.run(tiny_frames)
        engine.observe(tiny_frames, cut=True, taps=True)
    made = []

    def counted(*arguments, **options):
        made.append(arguments)
        raise AssertionError("a session was built")

    monkeypatch.setattr(ort, "InferenceSession", counted)
    for seed in range(2, 8):
        engine.apply(merge(random_delta(bundle, seed)))
        engine.run(tiny_frames)
        engine.observe(tiny_frames, cut=True, taps=True)
    assert not made


def test_back_to_source_is_bit_for_bit_source(bundle, merge, tiny_frames):
    engine = OnnxRuntimeEngine(bundle)
    before = engine.run(tiny_frames)
    seen = engine.observe(tiny_frames, cut=True, taps=True)
    for seed in range(3):
        engine.apply(merge(random_delta(bundle, seed)))
        assert not np.array_equal(engine.run(tiny_frames), before)
        engine.apply(merge(Delta.source()))
        assert np.array_equal(engine.run(tiny_frames), before)
        again = engine.observe(tiny_frames, cut=True, taps=True)
        assert np.array_equal(again.taps, seen.taps)
        assert np.array_equal(again.cut, seen.cut)


@pytest.mark.parametrize("looking", [False, True], ids=["run", "observe"])
def test_an_answer_is_never_a_mixture_of_two_deltas(bundle, merge, tiny_frames, looking):
    engine = OnnxRuntimeEngine(bundle)
    updates = [merge(random_delta(bundle, seed)) for seed in (0, 1)]
    frames = tiny_frames[:8]

    def answer() -> bytes:
        return (engine.observe(frames, cut=False, taps=True).logits if looking else engine.run(frames)).tobytes()

    expected = set()
    for update in updates:
        engine.apply(update)
        expected.add(answer())
    assert len(expected) == 2
    stop = threading.Event()
    failed: list[BaseException] = []

    def change() -> None:
        try:
            for update in itertools.cycle(updates):
                if stop.is_set():
                    return
                engine.apply(update)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        found = {answer() for _ in range(1500)}
    finally:
        stop.set()
        thread.join()
    assert not failed
    assert found == expected


def test_observe_answers_as_run_does(bundle, merge, tiny_frames):
    engine = OnnxRuntimeEngine(bundle)
    for update in (merge(Delta.source()), merge(random_delta(bundle, 3))):
        engine.apply(update)
        expected = engine.run(tiny_frames)
        for cut, taps in itertools.product((False, True), repeat=2):
            seen = engine.observe(tiny_frames, cut=cut, taps=taps)
            assert distance(seen.logits, expected) < 1e-5
            assert (seen.cut is not None) == cut
            assert (seen.taps is not None) == taps


def test_the_cut_is_what_the_original_module_has_there(device_bundle, tiny_net, tiny_frames):
    with torch.no_grad():
        expected = tiny_net.block(tiny_net.stem(torch.from_numpy(tiny_frames))).numpy()
    assert distance(OnnxRuntimeEngine(device_bundle).observe(tiny_frames, cut=True, taps=False).cut, expected) < 1e-5


def test_taps_are_the_moments_of_the_maps(bundle, merge, tiny_net, tiny_frames):
    """All positions, or every second one, as the manifest says; from the original module's own norm outputs."""
    maps: dict[str, torch.Tensor] = {}
    hooks = [
        tiny_net.get_submodule(site.name).register_forward_hook(
            lambda module, inputs, output, name=site.name: maps.__setitem__(name, output)
        )
        for site in bundle.manifest.sites
    ]
    with torch.no_grad():
        tiny_net(torch.from_numpy(tiny_frames))
    for hook in hooks:
        hook.remove()
    expected = []
    for site in bundle.manifest.sites:
        values = maps[site.name]
        assert values.shape[2] <= 2 * 16  # else the step would be larger
        if bundle.manifest.tap_side:
            values = values[:, :, ::2, ::2]
        expected.append(torch.stack([values.mean(dim=(2, 3)), values.square().mean(dim=(2, 3))], 1))
    engine = OnnxRuntimeEngine(bundle)
    taps = engine.observe(tiny_frames, cut=False, taps=True).taps
    assert taps.shape == (len(tiny_frames), 2, bundle.channels)
    assert distance(taps, torch.cat(expected, 2).numpy()) < 1e-5
    plain = TorchEngine(bundle)
    for each in (engine, plain):
        each.apply(merge(random_delta(bundle, 5)))
    found = engine.observe(tiny_frames, cut=False, taps=True).taps
    assert distance(found, plain.observe(tiny_frames, cut=False, taps=True).taps) < 1e-5


def test_a_provider_that_is_not_there_is_no_silent_fallback(device_bundle):
    for provider in ("CUDAExecutionProvider", "NoSuchExecutionProvider"):
        if provider in ort.get_available_providers():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ONNX Runtime warns about it too; the error is what counts
            with pytest.raises(EngineError, match=provider):
                OnnxRuntimeEngine(device_bundle, provider=provider)


def test_a_parameter_that_is_not_live_is_named(bundle, merge):
    with pytest.raises(StateError, match="nowhere"):
        merge(Delta({"tail/nowhere.weight": np.ones(3)}))


def test_the_engine_answers_any_batch_alike(bundle, merge, tiny_frames):
    engine = OnnxRuntimeEngine(bundle)
    engine.apply(merge(random_delta(bundle, 2)))
    whole = engine.run(tiny_frames)
    for size in (1, 3, 64):
        parts = [engine.run(tiny_frames[at : at + size]) for at in range(0, len(tiny_frames), size)]
        assert distance(np.concatenate(parts), whole) < 1e-5


# Layouts -------------------------------------------------------------------------------------------------------------


@st.composite
def stored(draw):
    """A weight, and one way to store it: (plain, layout)."""
    kind = draw(st.sampled_from(["bias", "matrix", "maps"]))
    sizes = {"bias": 1, "matrix": 2, "maps": draw(st.integers(3, 4))}[kind]
    shape = (draw(st.integers(1, 40)), *(draw(st.integers(1, 9)) for _ in range(sizes - 1)))
    block = draw(st.sampled_from(BLOCKS))
    inputs_too = kind == "maps" and draw(st.booleans())
    rows = -(-shape[0] // block) * block
    columns = [-(-shape[1] // block) * block] if inputs_too else list(shape[1:2])
    plain = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    return plain, Layout(block, inputs_too, (rows, *columns, *shape[2:]))


@given(stored())
@settings(max_examples=200, deadline=None)
def test_every_number_lies_where_the_layout_says(case):
    plain, layout = case
    flat = layout.store(plain).ravel()
    block = layout.block
    assert flat.size == np.prod(layout.shape)
    spatial = int(np.prod(plain.shape[2:])) if plain.ndim > 1 else 1
    inputs = plain.shape[1] if plain.ndim > 1 else 1
    columns = layout.shape[1] if layout.inputs_too else inputs
    used = set()
    for index in np.ndindex(*plain.shape):
        output, channel = index[0], index[1] if plain.ndim > 1 else 0
        position = int(np.ravel_multi_index(index[2:], plain.shape[2:])) if plain.ndim > 2 else 0
        if layout.inputs_too:  # blocks of outputs, blocks of inputs, positions, inputs, outputs
            outer = (output // block * (columns // block) + channel // block) * spatial + position
            place = (outer * block + channel % block) * block + output % block
        else:  # blocks of outputs, inputs, positions, outputs
            place = ((output // block * inputs + channel) * spatial + position) * block + output % block
        assert flat[place] == plain[index]
        used.add(place)
    assert not flat[[place for place in range(flat.size) if place not in used]].any()


@given(stored())
@settings(max_examples=100, deadline=None)
def test_a_layout_is_found_again_and_scales_its_channels(case):
    plain, layout = case
    array = layout.store(plain)
    found = find_layout(plain, array)
    assert found is not None
    assert np.array_equal(found.store(plain * 2), array * 2)
    if plain.ndim > 1:
        blocks, inner, width = found.channel_shape(array.shape)
        scale = np.linspace(0.5, 2, plain.shape[0], dtype=np.float32)
        padded = np.pad(scale, (0, blocks * width - len(scale)), constant_values=1).reshape(blocks, 1, width)
        scaled = (array.reshape(blocks, inner, width) * padded).reshape(array.shape)
        assert np.array_equal(scaled, found.store(plain * scale.reshape(-1, *(1,) * (plain.ndim - 1))))


def test_a_layout_that_is_not_known_is_not_guessed():
    plain = np.arange(1, 65, dtype=np.float32).reshape(8, 8)
    assert find_layout(plain, plain[::-1].copy()) is None
    assert find_layout(plain, np.zeros((8, 9), np.float32)) is None
