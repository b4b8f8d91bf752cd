"""What can be exported: a model of the zoo, a torch module from a factory, or somebody's .onnx file."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import nn

from edge_adapt.bundle import InputSpec
from edge_adapt.errors import ArtifactError, ConfigError
from exporters.onnx_from_torch import export_network
from exporters.onnx_import import import_network
from exporters.passes import tidy
from exporters.zoo import get as zoo_model
from exporters.zoo import load_weights, packaged_weights


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is exported: a torch module, or a graph that somebody else made."""

    name: str
    module: nn.Module | None
    network: onnx.ModelProto
    input: InputSpec
    classes: tuple[str, ...] | None
    cut: str | None
    provenance: dict[str, str]


def from_spec(
    spec: str,
    *,
    weights: Path | None,
    classes: Sequence[str] | None = None,
    fed: tuple[float, tuple[float, ...], tuple[float, ...]] = (1.0, (0.0,), (1.0,)),
) -> Model:
    """`zoo:name`, `package.module:factory` or a path to an .onnx file -> what to export.

    Args:
        fed: scale, mean and std of the input of an .onnx file, which does not say them itself.
    Raises: EdgeAdaptError.
    """
    if spec.endswith(".onnx"):
        return _from_file(Path(spec), classes, fed)
    if spec.startswith("zoo:"):
        return _from_zoo(spec.removeprefix("zoo:"), weights)
    if ":" not in spec:
        raise ConfigError(
            f"{spec!r} is no model", remedy="give zoo:NAME, package.module:factory, or a path that ends in .onnx"
        )
    return _from_factory(spec, weights, classes)


def from_module(
    module: nn.Module,
    name: str,
    spec: InputSpec,
    *,
    classes: Sequence[str] | None = None,
    cut: str | None = None,
    provenance: dict[str, str] | None = None,
    prompt_width: int | None = None,
) -> Model:
    """A torch module in eval mode, images [N, ...] -> logits [N, K]."""
    example = torch.randn(1, *spec.shape, generator=torch.Generator().manual_seed(0))
    network = tidy(export_network(module, example, prompt_width=prompt_width))
    return Model(
        name=name,
        module=module,
        network=network,
        input=spec,
        classes=tuple(classes) if classes else None,
        cut=cut,
        provenance={"torch": torch.__version__, **(provenance or {})},
    )


def _from_zoo(name: str, weights: Path | None) -> Model:
    entry = zoo_model(name)
    module = entry.factory()
    file = weights or packaged_weights(name)
    if file is not None:
        load_weights(module, file)
    facts = entry.input
    spec = InputSpec(
        shape=facts.shape, scale=facts.scale, mean=facts.mean, std=facts.std, resize=facts.resize
    )
    return from_module(
        module,
        name,
        spec,
        classes=entry.classes,
        cut=entry.cut,
        provenance={"model": f"zoo:{name}", "weights": _fingerprint(file) if file else "random start, seed 0"},
        prompt_width=getattr(module, "prompt_width", None),
    )


def _from_factory(spec: str, weights: Path | None, classes: Sequence[str] | None) -> Model:
    package, _, attribute = spec.partition(":")
    try:
        factory = getattr(importlib.import_module(package), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the model {spec!r} cannot be found: {error}", remedy="give package.module:factory, importable from here"
        ) from error
    module = factory()
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{spec} returned {type(module).__name__}, no torch module", remedy="return the model")
    if weights is not None:
        load_weights(module, weights)
    shape = getattr(module, "input_shape", None)
    if shape is None:
        raise ConfigError(
            f"{spec} does not say what it is fed",
            remedy="set input_shape (and input_scale, input_mean, input_std, class_names) on the module",
        )
    input_spec = InputSpec(
        shape=tuple(shape),
        scale=getattr(module, "input_scale", 1.0),
        mean=tuple(getattr(module, "input_mean", (0.0,))),
        std=tuple(getattr(module, "input_std", (1.0,))),
    )
    names = classes or getattr(module, "class_names", None)
    provenance = {"model": spec, "weights": _fingerprint(weights) if weights else "as the factory made them"}
    return from_module(module.eval(), attribute, input_spec, classes=names, provenance=provenance)


def _from_file(
    path: Path, classes: Sequence[str] | None, fed: tuple[float, tuple[float, ...], tuple[float, ...]]
) -> Model:
    if not path.exists():
        raise ArtifactError(f"{path} does not exist", remedy="check the path")
    network = tidy(import_network(path))
    shape = tuple(dim.dim_value for dim in network.graph.input[0].type.tensor_type.shape.dim)[1:]
    if not shape or not all(shape):
        raise ArtifactError(f"{path} has an input of shape {shape}; one frame must have a fixed size", remedy="fix it")
    channels = shape[-1] if len(shape) == 3 and shape[-1] in (1, 3, 4) and shape[0] > 4 else shape[0]
    for name, values in (("mean", fed[1]), ("std", fed[2])):
        if len(values) not in (1, channels):
            raise ConfigError(
                f"{name} has {len(values)} numbers, the input has {channels} channels", remedy="give one, or one each"
            )
    layout = "NCW" if len(shape) == 2 else "NHWC" if shape[-1] in (1, 3, 4) and shape[0] > 4 else "NCHW"
    return Model(
        name=path.stem,
        module=None,
        network=network,
        input=InputSpec(shape=shape, layout=layout, scale=fed[0], mean=fed[1], std=fed[2]),
        classes=tuple(classes) if classes else None,
        cut=None,
        provenance={"model": path.name, "weights": _fingerprint(path)},
    )


def _fingerprint(path: Path) -> str:
    return f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
