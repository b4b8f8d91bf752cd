"""Hypernetwork of the label shift adapter: from a label distribution to a change of features and head.

Park et al., "Label Shift Adapter for Test-Time Adaptation under Covariate and Label Shifts", ICCV 2023, in a form of
ours: f(x; pi) = (W + dW(pi)) (gamma(pi) * z + beta(pi)) + b + db(pi), and what it changes is counted from what it
makes of the source prior, so that nothing is changed there. No torch: it answers on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from edge_adapt.bundle import Bundle
from edge_adapt.delta import write_atomically
from edge_adapt.errors import ArtifactError

Array = NDArray[Any]
Values = Mapping[str, Any]
"""Arrays, or tensors while it is trained."""

FILE = "adapters/label_shift.safetensors"
SCHEMA, KIND = "1", "label_shift"
HIDDEN, FACTORS = 64, 8
BALANCED = 1.5
"""Up to this ratio of the most to the least frequent class a source is balanced, and has no degree of imbalance."""
LARGEST_DEGREE = 1.5
LEAST = 1e-6
"""Probability that a class has at least, before its logarithm is taken."""


def source_prior(measured: Array | None, classes: int) -> Array:
    """[K], what calibration measured, no class without any; uniform where it did not."""
    made = np.full(classes, 1 / classes) if measured is None else np.maximum(measured.astype(np.float64), LEAST)
    shares: Array = made / made.sum()
    return shares


def degree(prior: Array, source: Array) -> Array:
    """How much a prior [..., K] is like the source's: 1 is the source prior, 0 is uniform, -1 is about its inverse."""
    direction = np.log(source) - np.log(source).mean()
    uniform = 1 / len(source)
    made: Array = (prior - uniform) @ direction / ((source - uniform) @ direction)
    return made.clip(-LARGEST_DEGREE, LARGEST_DEGREE)


def is_balanced(source: Array) -> bool:
    """True where no degree of imbalance can be told."""
    return bool(source.max() <= BALANCED * source.min())


def inputs(prior: Array, source: Array) -> Array:
    """What the hypernetwork is told of a prior [..., K]: its degree [..., 1], or for a balanced source all of it."""
    if not is_balanced(source):
        return degree(prior, source)[..., None]
    logs = np.log(np.maximum(prior, LEAST))
    made: Array = logs - logs.mean(axis=-1, keepdims=True)
    return made


def shapes(classes: int, width: int, told: int) -> dict[str, tuple[int, ...]]:
    """Of all values, for K classes, D features and so many numbers told of the prior."""
    outputs = 2 * width + classes + FACTORS
    return {
        "hidden.weight": (HIDDEN, told),
        "hidden.bias": (HIDDEN,),
        "out.weight": (outputs, HIDDEN),
        "out.bias": (outputs,),
        "left": (FACTORS, classes),
        "right": (FACTORS, width),
    }


def change(values: Values, head: Any, features: Any, told: Any, told_of_source: Any) -> Any:
    """What is to be added to the logits, [N, K]; for arrays and for tensors.

    Args:
        values: as in `shapes`.
        head: W [K, D] of the source model.
        features: z [N, D].
        told: of the prior, [N or 1, numbers]; `told_of_source` is [1, numbers].
    """
    width, classes = features.shape[1], head.shape[0]
    made = _outputs(values, told) - _outputs(values, told_of_source)
    scale, shift = made[:, :width], made[:, width : 2 * width]
    bias, factors = made[:, 2 * width : 2 * width + classes], made[:, 2 * width + classes :]
    moved = scale * features + shift
    return moved @ head.T + ((features + moved) @ values["right"].T * factors) @ values["left"] + bias


def _outputs(values: Values, told: Any) -> Any:
    hidden = told @ values["hidden.weight"].T + values["hidden.bias"]
    return (hidden * (hidden > 0)) @ values["out.weight"].T + values["out.bias"]


@dataclass(frozen=True)
class LabelShiftNet:
    """A trained one."""

    values: dict[str, Array]
    head: Array
    """W [K, D] of the source model."""
    source: Array
    """[K], the prior it was trained under."""
    temperature: float
    """What logits of this network are to be divided by to be probabilities of about the right certainty."""

    def change(self, features: Array, prior: Array) -> Array:
        """What is to be added to the logits, [N, K], for features [N, D] under a prior [K]."""
        told, told_of_source = (inputs(each[None], self.source) for each in (prior, self.source))
        made: Array = change(self.values, self.head, features.astype(np.float64), told, told_of_source)
        return made


def save(folder: Path, net: LabelShiftNet) -> Path:
    """Write it into the folder of a bundle; returns the file."""
    file = folder / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.astype(np.float32) for name, value in net.values.items()}
    tensors["source"] = net.source.astype(np.float32)
    facts = {"schema": SCHEMA, "kind": KIND, "temperature": repr(float(net.temperature))}
    write_atomically(file, to_safetensors(tensors, metadata=facts))
    return file


def load(bundle: Bundle) -> LabelShiftNet | None:
    """The bundle's, or None if it has none. Raises: ArtifactError if it is damaged or does not fit."""
    file = bundle.path / FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="numpy") as opened:
            facts = opened.metadata() or {}
            values = {name: opened.get_tensor(name).astype(np.float64) for name in opened.keys()}  # noqa: SIM118
        temperature = float(facts.get("temperature", "nan"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}", remedy="copy the bundle again") from error
    if facts.get("schema") != SCHEMA or facts.get("kind") != KIND:
        raise ArtifactError(
            f"{file} is schema {facts.get('schema')!r} of {facts.get('kind')!r}, expected {SCHEMA!r} of {KIND!r}",
            remedy="export the bundle again",
        )
    head = bundle.source["head.weight"].astype(np.float64)
    source = values.pop("source", np.zeros(0))
    fits = source.shape == (len(head),) and bool((source > 0).all())
    told = len(source) if fits and is_balanced(source) else 1
    expected = shapes(len(head), head.shape[1], told)
    found = {name: value.shape for name, value in values.items()}
    finite = all(np.isfinite(value).all() for value in values.values())
    if not fits or found != expected or not finite or not temperature >= 1:
        raise ArtifactError(
            f"{file} does not fit the head of bundle {bundle.manifest.name!r}, {head.shape}",
            remedy="remove it, or export the bundle again",
        )
    return LabelShiftNet(values, head, source / source.sum(), temperature)
