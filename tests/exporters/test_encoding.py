"""The encoder as nodes of a graph gives the bits that NumPy gives."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edge_adapt.bundle import FULL, TRUNK
from edge_adapt.engines.twin import twin
from edge_adapt.errors import ConfigError
from edge_adapt.routing.codes import packed
from edge_adapt.routing.encoder import Encoder
from edge_adapt.taps import undo
from exporters.encoding import CODE, with_code

CLOSE = 1e-6
"""Encodings nearer to 0 may have either sign: sums are ordered otherwise."""


@pytest.mark.parametrize("graph", [FULL, TRUNK])
def test_runtime_gives_the_same_bits(device_bundle, tiny_frames, graph):
    model = onnx.load(device_bundle.path / graph)
    if graph == FULL:
        model = twin(model, device_bundle, (False, True, False))
    sites = [site for site in device_bundle.manifest.sites if graph == FULL or not site.in_tail]
    weight, bias = (
        np.concatenate([device_bundle.source[f"{site.name}.{role}"] for site in sites]) for role in ("weight", "bias")
    )
    ones, zeros = np.ones_like(weight), np.zeros_like(weight)

    def look(made, outputs, frames):
        session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        needed = {info.name for info in session.get_inputs()}
        ports = {"ports_scale": ones, "ports_shift": zeros}
        image = model.graph.input[0].name
        return session.run(outputs, {name: frames if name == image else ports[name] for name in needed})

    taps = undo(look(model, ["taps"], tiny_frames)[0], weight, bias, ones, zeros)
    encoder = Encoder.fitted(tuple(part[:64] for part in taps), [site.channels for site in sites])
    coded = with_code(model, encoder, weight, bias)
    onnx.checker.check_model(coded, full_check=True)
    found = look(coded, [CODE], tiny_frames)[0]
    encodings = encoder(taps)
    assert found.dtype == np.uint8 and found.shape == (len(tiny_frames), encoder.width // 8)
    differ = np.unpackbits(found ^ packed(encodings), axis=1).astype(bool)
    assert not differ[np.abs(encodings) > CLOSE].any()
    assert (np.abs(encodings) <= CLOSE).mean() < 1e-3
    assert np.array_equal(look(coded, [CODE], tiny_frames[:1])[0], found[:1])


def test_what_does_not_fit_is_refused(device_bundle):
    full = onnx.load(device_bundle.path / FULL)
    channels = device_bundle.channels
    encoder = Encoder((channels,), np.zeros((2, 16)), np.ones((2, 16)))
    with pytest.raises(ConfigError, match="no output `taps`"):
        with_code(full, encoder, np.ones(channels), np.zeros(channels))
    tapped = twin(full, device_bundle, (False, True, False))
    with pytest.raises(ConfigError, match="7 channels"):
        with_code(tapped, encoder, np.ones(7), np.zeros(7))
