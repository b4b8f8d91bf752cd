"""Whole exports: the engine against the original module or file, and trunk.onnx as a stranger runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from edge_adapt.bundle import TRUNK, Bundle, InputSpec
from edge_adapt.cli import run
from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.merge import Merger
from edge_adapt.preprocess import Preprocess
from exporters.export import check, export, from_module, from_spec
from exporters.parity import ported, random_ports
from exporters.zoo.vit import VisionTransformer

TOLERANCE = 1e-4
MODELS = {
    "cifar-resnet20": "cifar10_resnet20.safetensors",
    "mlperf-resnet8": "cifar10_resnet8_mlperftiny.safetensors",
    "mlperf-kws": "kws_dscnn.safetensors",
    "cifar-resnet32": "cifar10_resnet32.safetensors",
    "cifar-resnet44": None,
    "cifar-resnet56": "cifar10_resnet56.safetensors",
    "efficientnet-lite0": None,
    "vit-tiny": None,
}
FAST = ("cifar-resnet20", "mlperf-resnet8", "mlperf-kws")


def distance(found, expected) -> float:
    """Largest difference as a share of the output's scale, worked out here and not by the exporter."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def moved(module, bundle: Bundle, delta: Delta) -> torch.nn.Module:
    """The original module with what the ports say written into its own norms, and every site accounted for."""
    names = {site.name for site in bundle.manifest.sites}
    kinds = (torch.nn.BatchNorm2d, torch.nn.LayerNorm)
    assert names == {name for name, part in module.named_modules() if isinstance(part, kinds)}
    return ported(module, bundle, delta)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_the_engine_equals_the_original_module_under_identity_and_random_ports(name, request, tmp_path):
    file = MODELS[name]
    weights = request.getfixturevalue("shared_data") / "models" / file if file else None
    model = from_spec(f"zoo:{name}", weights=weights)
    bundle = Bundle.load(export(model, tmp_path / "bundle"))
    frames = np.random.default_rng(7).standard_normal((6, *bundle.manifest.input.shape), np.float32)
    x = torch.from_numpy(frames)
    engine, merge = OnnxRuntimeEngine(bundle), Merger(bundle)
    assert engine.is_live
    for delta in (Delta.source(), random_ports(bundle, 3), random_ports(bundle, 4), Delta.source()):
        engine.apply(merge(delta))
        with torch.no_grad():
            module = moved(model.module, bundle, delta) if delta else model.module
            expected = module(x).numpy()
        assert distance(engine.run(frames), expected) < TOLERANCE
        assert distance(engine.run(frames[:1]), expected[:1]) < TOLERANCE


def test_the_tiny_network_with_every_kind_of_site_equals_torch(tiny_net, device_bundle, tiny_frames):
    engine, merge = OnnxRuntimeEngine(device_bundle), Merger(device_bundle)
    for seed in range(4):
        delta = random_ports(device_bundle, seed)
        engine.apply(merge(delta))
        with torch.no_grad():
            expected = moved(tiny_net, device_bundle, delta)(torch.from_numpy(tiny_frames)).numpy()
        assert distance(engine.run(tiny_frames), expected) < TOLERANCE


def test_a_small_transformer_with_layer_norm_ports_equals_torch(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = VisionTransformer(image=16, patch=4, dim=16, depth=2, heads=2, classes=5).eval()
        for part in net.modules():
            if isinstance(part, torch.nn.LayerNorm):
                part.weight.data.uniform_(0.7, 1.3)
                part.bias.data.normal_(0, 0.2)
    model = from_module(net, "vit", InputSpec(shape=(3, 16, 16)), cut="blocks.0", prompt_width=16)
    bundle = Bundle.load(export(model, tmp_path / "bundle"))
    assert bundle.manifest.prompts == 16
    frames = np.random.default_rng(0).standard_normal((5, 3, 16, 16), np.float32)
    engine, merge = OnnxRuntimeEngine(bundle), Merger(bundle)
    assert engine.is_live
    for seed in range(3):
        delta = random_ports(bundle, seed)
        engine.apply(merge(delta))
        with torch.no_grad():
            expected = moved(net, bundle, delta)(torch.from_numpy(frames)).numpy()
        assert distance(engine.run(frames), expected) < TOLERANCE


# Third-party files --------------------------------------------------------------------------------------------------


def mnist(data: Path):
    with np.load(data / "digits_mnist_usps_test.npz") as file:
        return file["mnist_images"][:1000, None].astype(np.float32), file["mnist_labels"][:1000]


def squeezenet(data: Path):
    with np.load(data / "cifar10_test.npz") as file:
        return file["images"][:600].astype(np.float32) / 256, file["labels"][:600]


HAR_MEAN = (-0.000636, -0.000292, -0.000275, 0.000506, -0.000824, 0.000113, 0.804749, 0.028755, 0.086498)
HAR_STD = (0.194846, 0.122427, 0.106879, 0.406815, 0.381854, 0.255743, 0.414112, 0.390995, 0.357769)


def har(data: Path):
    """Every tenth of the standard windows: half overlapping, 128 steps."""
    with np.load(data / "uci_har_stream.npz") as file:
        signal = file["signal"].astype(np.float32) * file["scale"]
        segments = list(zip(file["segment_start"], file["segment_length"], file["segment_label"], strict=True))
    starts = [(start + at, label) for start, length, label in segments for at in range(0, int(length) - 127, 64)][::10]
    frames = np.stack([signal[:, at : at + 128] for at, _ in starts])
    mean, std = (np.array(value, np.float32)[:, None] for value in (HAR_MEAN, HAR_STD))
    return (frames - mean) / std, np.array([label for _, label in starts])


FOREIGN = {
    # file: (frames and labels, layout, top-1 of the data's README in per cent, allowed difference on a part of it)
    "mnist_cnn": (mnist, "NCHW", 98.4, 1.0),
    "uci_har_cnn": (har, "NCW", 97.5, 1.5),
    "cifar10_squeezenet_nhwc": (squeezenet, "NHWC", 77.05, 4.0),
}


@pytest.fixture(scope="module", params=list(FOREIGN))
def foreign(request, shared_data, tmp_path_factory):
    read, layout, top1, slack = FOREIGN[request.param]
    frames, labels = read(shared_data)
    path = shared_data / "models" / f"{request.param}.onnx"
    folder = tmp_path_factory.mktemp("foreign") / "bundle"
    bundle = Bundle.load(export(from_spec(str(path), weights=None), folder, calibration=frames[::2]))
    assert bundle.manifest.input.layout == layout
    return path, bundle, frames, labels, (top1, slack)


def original_answers(path: Path, frames) -> np.ndarray:
    """ONNX Runtime on the file as it came; one frame at a time where its batch is fixed."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    weights = {info.name for info in session.get_overridable_initializers()}
    image = next(info for info in session.get_inputs() if info.name not in weights)
    step = 1 if image.shape[0] == 1 else 50
    parts = [session.run(None, {image.name: frames[at : at + step]})[0] for at in range(0, len(frames), step)]
    return np.concatenate(parts)


def test_a_foreign_file_keeps_its_answers_and_its_accuracy(foreign):
    path, bundle, frames, labels, (top1, slack) = foreign
    engine = OnnxRuntimeEngine(bundle)
    found = np.concatenate([engine.run(frames[at : at + 100]) for at in range(0, len(frames), 100)])
    assert distance(found, original_answers(path, frames)) < TOLERANCE
    accuracy = float((found.argmax(1) == labels).mean()) * 100
    assert abs(accuracy - top1) < slack


def test_a_foreign_file_answers_any_batch(foreign):
    _, bundle, frames, _, _ = foreign
    engine = OnnxRuntimeEngine(bundle)
    seven = engine.run(frames[:7])
    assert seven.shape == (7, bundle.manifest.outputs)
    for index in range(7):
        assert distance(engine.run(frames[index : index + 1]), seven[index : index + 1]) < 1e-5


def test_a_foreign_file_without_norms_gets_ports_from_its_calibration(foreign):
    _, bundle, frames, _, _ = foreign
    assert bundle.manifest.sites
    assert bundle.manifest.parity.data == "calibration"
    mean = bundle.source["taps.mean"]  # what the norms subtract is what calibration measured; taps see a sample
    assert np.sqrt(np.square(mean).mean()) < 0.2
    engine, rebuilt, merge = OnnxRuntimeEngine(bundle), OnnxRuntimeEngine(bundle, live=False), Merger(bundle)
    assert engine.is_live
    update = merge(random_ports(bundle, 1))
    before = engine.run(frames[:7])
    for each in (engine, rebuilt):
        each.apply(update)
    after = engine.run(frames[:7])
    assert distance(after, rebuilt.run(frames[:7])) < 1e-5
    assert distance(after, before) > 1e-3
    assert max(check(bundle.path).values()) < TOLERANCE


def test_probabilities_are_named_as_such(foreign):
    path, bundle, frames, _, _ = foreign
    sums = OnnxRuntimeEngine(bundle).run(frames[:7]).sum(axis=1)
    expected = "probabilities" if np.allclose(sums, 1, atol=1e-4) else "logits"
    assert bundle.manifest.output == expected
    assert (expected == "probabilities") == ("squeezenet" in path.name)


# trunk.onnx ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trunk(device_bundle) -> ort.InferenceSession:
    """In an ordinary session, as somebody without this package has it."""
    return ort.InferenceSession(str(device_bundle.path / TRUNK), providers=["CPUExecutionProvider"])


def trunk_sites(bundle: Bundle):
    return [site for site in bundle.manifest.sites if not site.in_tail]


def test_the_trunk_runs_unaware_of_ports(trunk, device_bundle, tiny_frames):
    cut, taps = trunk.run(None, {"image": tiny_frames[:7]})
    seen = OnnxRuntimeEngine(device_bundle).observe(tiny_frames[:7], cut=True, taps=True)
    channels = sum(site.channels for site in trunk_sites(device_bundle))
    assert cut.shape == (7, *device_bundle.manifest.cut.shape)
    assert distance(cut, seen.cut) < 1e-5
    assert taps.shape == (7, 2, channels)
    assert distance(taps, seen.taps[:, :, :channels]) < 1e-5
    assert len(trunk.run(None, {"image": tiny_frames[:1]})[0]) == 1


def test_the_trunk_with_ports_equals_the_engine_with_ports(trunk, device_bundle, tiny_frames):
    delta = random_ports(device_bundle, 5)
    engine = OnnxRuntimeEngine(device_bundle)
    engine.apply(Merger(device_bundle)(delta))
    sites = trunk_sites(device_bundle)
    feeds = {
        name: np.concatenate([delta[name][device_bundle.slices[site.name]] for site in sites])
        for name in (PORT_SCALE, PORT_SHIFT)
    }
    names = {PORT_SCALE: "ports_scale", PORT_SHIFT: "ports_shift"}
    cut, taps = trunk.run(None, {"image": tiny_frames, **{names[name]: value for name, value in feeds.items()}})
    seen = engine.observe(tiny_frames, cut=True, taps=True)
    assert distance(cut, seen.cut) < 1e-5
    assert taps.shape == (len(tiny_frames), 2, sum(site.channels for site in sites))
    assert np.isfinite(taps).all()


def test_the_trunk_of_a_reference_bundle_is_the_input(reference_bundle, tiny_frames):
    session = ort.InferenceSession(str(reference_bundle.path / TRUNK), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {session.get_inputs()[0].name: tiny_frames})[0], tiny_frames)


# The commands --------------------------------------------------------------------------------------------------------


def test_info_prints_the_manifest_as_json(device_bundle, capsys):
    assert run(["info", str(device_bundle.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == device_bundle.manifest.model_dump(mode="json")
    assert shown["outputs"] == 5
    assert [site["name"] for site in shown["sites"]] == ["stem.1", "block.bn", "alone", "depthwise_bn", "point_bn"]
    assert [site["in_tail"] for site in shown["sites"]] == [False, False, True, True, True]


def test_info_says_the_same_in_words(device_bundle, capsys):
    assert run(["info", str(device_bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert "5 norm sites" in shown or "5, 48 channels" in shown
    assert "block" in shown


@pytest.mark.parametrize("which", ["device_bundle", "reference_bundle"])
def test_check_passes_a_good_bundle(which, request, capsys):
    assert run(["check", str(request.getfixturevalue(which).path)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("engine", "random_ports", "tail"))


def test_export_by_command_with_weights_and_calibration(shared_data, tmp_path, capsys):
    images = np.load(shared_data / "cifar10_train_10k.npz")["images"][:40]
    np.savez(tmp_path / "source.npz", images=images)
    weights = shared_data / "models" / "cifar10_resnet8_mlperftiny.safetensors"
    out = tmp_path / "deep" / "er" / "bundle"
    arguments = ["--weights", str(weights), "--calibration", str(tmp_path / "source.npz"), "--out", str(out)]
    assert run(["export", "zoo:mlperf-resnet8", *arguments]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    bundle = Bundle.load(out)
    assert bundle.manifest.calibration_samples == 40
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    preprocessed = Preprocess(bundle.manifest.input)(images)
    assert OnnxRuntimeEngine(bundle).run(preprocessed).shape == (40, 10)
