"""The bundle: the folder that export writes and a device loads. Read here, checked here, never unpickled."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, PROMPTS, Delta
from edge_adapt.errors import ArtifactError, StateError

Array = NDArray[Any]

SCHEMA = 1
MANIFEST, FULL, TRUNK, TAIL, SOURCE = (
    *("manifest.json", "full.onnx", "trunk.onnx"),
    *("tail.pt2", "source.safetensors"),
)
FULL_INT8 = "full.int8.onnx"
"""full.onnx with its convolutions in INT8, as QuantizeLinear and DequantizeLinear say it; only of an INT8 bundle."""
INPUT_CUT = "input"
"""The cut that makes the whole network the tail: reference mode."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputSpec(_Part):
    """What the network is fed: `(raw / scale - mean) / std`, channel by channel, as float32."""

    shape: tuple[int, ...]
    """One frame without the batch, in `layout`."""
    layout: Literal["NCHW", "NHWC", "NCW"] = "NCHW"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    resize: tuple[int, int] | None = None
    """Short side and side of the centre crop, in pixels, for images of another size."""

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.layout == "NHWC" else self.shape[0]


class Site(_Part):
    """A norm site: a port and a tap of `channels` numbers each."""

    name: str
    kind: Literal["batch_norm", "layer_norm"]
    channels: int
    tensor: str
    """Its output in full.onnx, which the tap reads."""
    layer: str
    """The layer of full.onnx into which it is folded."""
    in_tail: bool = False


class LiveLayer(_Part):
    """A layer of full.onnx whose parameters may change while the engine runs."""

    name: str
    op: str
    weight: str
    bias: str | None = None


class Cut(_Part):
    """Where the trunk ends and the tail begins."""

    name: str
    tensor: str
    shape: tuple[int, ...]


class Head(_Part):
    """The linear layer that makes the logits."""

    layer: str
    features: str
    """Its input in full.onnx, [N, width]."""
    width: int


class Parity(_Part):
    """How far the engine was from torch when the bundle was made, as a share of the output's scale."""

    samples: int
    data: Literal["calibration", "random"]
    tolerance: float
    identity_ports: float
    random_ports: float
    tail: float


class WarmUp(_Part):
    """How the source model was made ready for shifts at export."""

    family: str
    """Of augmentations."""
    operations: tuple[str, ...]
    """All that the family does to an image, besides mirroring, cropping and mixing."""
    data: str
    """Name and hash of the images and labels."""
    images: int
    """Trained on."""
    held_out: int
    """Measured with."""
    settings: dict[str, float]
    """Epochs, seed and all others."""
    trained: tuple[str, ...]
    clean_error: tuple[float, float]
    """Before and after, in % of the images held out, by stored statistics."""
    augmented_error: tuple[float, float]
    """The same of those images augmented, by the statistics of each batch."""


class Quantised(_Part):
    """How the INT8 graph was made, and what it costs and gains, each as (with source's ports, with other ports)."""

    target: Literal["cpu", "tensorrt"]
    """What it is fast on: ONNX Runtime's CPU refuses nothing, but runs the graph that TensorRT takes slowly."""
    frames: int
    """That the ranges of activations were measured on, with source's ports and with others."""
    held_out: int
    """Other frames, that it was compared with float32 on."""
    agreement: tuple[float, float]
    """% of them with the same top-1 answer."""
    float_top1: tuple[float, float] | None = None
    """% right in float32, where there are labels."""
    int8_top1: tuple[float, float] | None = None
    speed: float
    """Time of float32 as a multiple of INT8's, one frame and one thread, on the machine that exported."""
    layers: int
    """Convolutions in INT8; everything else is float32."""


class Manifest(_Part):
    """manifest.json. Unknown keys are refused; a newer schema is refused before anything else is read."""

    schema_version: Literal[1] = 1
    name: str
    created: str
    input: InputSpec
    classes: tuple[str, ...] | None = None
    output: Literal["logits", "probabilities"] = "logits"
    outputs: int
    cut: Cut
    head: Head | None = None
    """None where the logits come from something else, such as a pooled convolution."""
    sites: tuple[Site, ...]
    layers: tuple[LiveLayer, ...]
    tap_side: int = 0
    """A tap looks at so many positions of a map along each side, at most; 0 is all of them."""
    prompts: int | None = None
    """Width of the prompt tokens that the graph takes, for a transformer."""
    opset: int
    precision: Literal["fp32", "int8"] = "fp32"
    """Of the answers; looks are float32 always."""
    quantised: Quantised | None = None
    calibration_samples: int = 0
    parity: Parity
    warm_up: WarmUp | None = None
    provenance: dict[str, str] = Field(default_factory=dict)
    files: dict[str, str]
    """File -> sha256."""


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle. Its files were checked against the hashes of the manifest."""

    path: Path
    manifest: Manifest
    source: dict[str, Array]
    """source.safetensors: `<site>.mean|std|weight|bias|offset` [C], `head.weight` [K, D] and `head.bias` [K], and what
    calibration measured."""

    @classmethod
    def load(cls, path: Path | str) -> Bundle:
        """Read and verify. Raises: ArtifactError naming the file that is missing, damaged or too new."""
        path = Path(path)
        manifest = read_manifest(path)
        for name, expected in manifest.files.items():
            found = sha256(path, name)
            if found != expected:
                raise ArtifactError(
                    f"{path / name} is damaged: its sha256 is {found[:12]}..., the manifest says {expected[:12]}...",
                    remedy="copy the bundle again, or export it again",
                )
        try:
            source = load_safetensors((path / SOURCE).read_bytes())
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path / SOURCE} cannot be read: {error}", remedy="export it again") from error
        for site in manifest.sites:
            for role in ("mean", "std", "weight", "bias", "offset"):
                name = f"{site.name}.{role}"
                shape = source[name].shape if name in source else None
                if shape != (site.channels,):
                    raise ArtifactError(
                        f"{path / SOURCE}: {name} has shape {shape}, {MANIFEST} says ({site.channels},)",
                        remedy="copy the bundle again, or export it again",
                    )
        return cls(path, manifest, source)

    @cached_property
    def id(self) -> str:
        """Short name of exactly this bundle: it changes when any file does."""
        text = json.dumps(self.manifest.files, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def is_reference(self) -> bool:
        """True when cut at the input: methods then run on the whole network in torch, as published."""
        return self.manifest.cut.name == INPUT_CUT

    @property
    def channels(self) -> int:
        """Channels of all sites: the length of a port vector."""
        return sum(site.channels for site in self.manifest.sites)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Site name -> its place in a port vector."""
        found, start = {}, 0
        for site in self.manifest.sites:
            found[site.name] = slice(start, start + site.channels)
            start += site.channels
        return found

    def packed(self, role: str) -> Array:
        """One constant of all sites, `mean`, `std`, `weight`, `bias` or `offset`, as one vector."""
        parts = [self.source[f"{site.name}.{role}"] for site in self.manifest.sites]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def check_delta(self, delta: Delta) -> None:
        """Raises: StateError if the delta does not fit, is not finite, or has a scale that is not positive."""
        if not delta.is_finite():
            raise StateError("the delta holds NaN or infinite numbers", remedy="roll back to the last good one")
        for name in (PORT_SCALE, PORT_SHIFT):
            if name in delta and delta[name].shape != (self.channels,):
                raise StateError(
                    f"{name} has shape {delta[name].shape}, the bundle's sites have {self.channels} channels",
                    remedy="use a delta that was learned on this bundle",
                )
        if PROMPTS in delta and (delta[PROMPTS].ndim != 2 or delta[PROMPTS].shape[1] != self.manifest.prompts):
            raise StateError(
                f"prompts have shape {delta[PROMPTS].shape}, the network takes [P, {self.manifest.prompts}]",
                remedy="use a delta that was learned on this bundle",
            )
        if PORT_SCALE in delta and float(delta[PORT_SCALE].min(initial=1.0)) <= 0:
            raise StateError("ports/scale has numbers that are not positive", remedy="roll back to the last good one")


def read_manifest(path: Path) -> Manifest:
    """The manifest alone. Raises: ArtifactError if there is none, it is too new, or it does not fit the schema."""
    file = path / MANIFEST
    try:
        raw = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path} is no bundle: it has no {MANIFEST}", remedy="make one with `edge-adapt export`"
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}", remedy="copy the bundle again") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > SCHEMA:
        raise ArtifactError(
            f"{file} has schema {version}, this version of edge-adapt reads up to {SCHEMA}",
            remedy="upgrade edge-adapt on this device",
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ArtifactError(
            f"{file} does not fit the schema: {where}: {first['msg']}", remedy="export the bundle again"
        ) from error


def sha256(path: Path, name: str) -> str:
    """Digest of one file of a bundle. Raises: ArtifactError if it is missing."""
    try:
        return hashlib.sha256((path / name).read_bytes()).hexdigest()
    except OSError as error:
        raise ArtifactError(
            f"{path / name} is missing or unreadable: {error.strerror}", remedy="copy the bundle again"
        ) from error
