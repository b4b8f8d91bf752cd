"""Labels that come late, and classes that come with them: what the methods that use labels share, as pure functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_adapt.errors import ConfigError, DataError
from edge_adapt.methods.optim import Tensors

Array = NDArray[Any]

CLOSED = -1e4
"""Bias of a class that the head does not know yet: it is never the answer, and the network stays finite."""


def checked(labels: Array, frames: int, outputs: int) -> Tensor:
    """Labels [N] as int64. Raises: DataError if they are not one class index for each frame."""
    found = np.asarray(labels)
    if found.shape != (frames,) or not np.issubdtype(found.dtype, np.integer):
        raise DataError(
            f"labels have shape {found.shape} and dtype {found.dtype}, expected ({frames},) integers",
            remedy="hand over one class index for each frame",
        )
    if not frames or found.min() < 0 or found.max() >= outputs:
        raise DataError(
            f"labels {sorted(set(found.tolist()))[:5]} are not all classes of a model with {outputs} outputs",
            remedy="hand over one frame or more, with labels from 0 on",
        )
    return torch.from_numpy(found.astype(np.int64))


def members(classes: tuple[int, ...] | None, outputs: int) -> Tensor:
    """[K] bool, True for some of the classes; None for all. Raises: ConfigError for one that the model has not."""
    if classes is None:
        return torch.ones(outputs, dtype=torch.bool)
    strangers = [index for index in classes if not 0 <= index < outputs]
    if strangers:
        raise ConfigError(
            f"known names class {strangers[0]}, the model has {outputs} outputs", remedy=f"use 0 to {outputs - 1}"
        )
    mask = torch.zeros(outputs, dtype=torch.bool)
    mask[list(classes)] = True
    return mask


def closed(head: Tensors, known: Tensor, layer: str) -> dict[str, Tensor]:
    """The head without the classes that are not known: no weights, and a bias that no answer overcomes.

    Args:
        head: `<layer>.weight` [K, D] and `<layer>.bias` [K].
        known: [K] bool.
    """
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    return {
        weight: torch.where(known[:, None], head[weight], 0.0),
        bias: torch.where(known, head[bias], CLOSED),
    }


def opened(values: Tensors, classes: Tensor, layer: str) -> dict[str, Tensor]:
    """The same values with some classes [K] bool of the head at their beginning: weights and bias of zero."""
    bias = f"{layer}.bias"
    return {**values, bias: torch.where(classes, 0.0, values[bias])}


def cross_entropy_among(logits: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Mean cross-entropy with the softmax over some of the classes [K] bool; the others get no gradient."""
    return nn.functional.cross_entropy(logits.masked_fill(~classes, -torch.inf), labels)


def beginning(known: Tensor) -> dict[str, Tensor]:
    """What is remembered of labels before the first: the task's number, and [K] bool of `seen` and `local` classes.

    Seen are those that the head knows, local those that were labelled in this task.
    """
    return {"task": torch.tensor(-1), "seen": known, "local": torch.zeros_like(known)}


def noted(own: Tensors, labels: Tensor, task: int) -> tuple[dict[str, Tensor], Tensor, bool]:
    """Take note of some labels: what is remembered after, classes [K] bool never seen before, and if a task begins.

    Labels of an older task, being late, count to the newest one.
    """
    begins = task > int(own["task"])
    here = torch.zeros_like(own["seen"])
    here[labels] = True
    local = here if begins else own["local"] | here
    after = {"task": torch.tensor(max(task, int(own["task"]))), "seen": own["seen"] | here, "local": local}
    return {**own, **after}, here & ~own["seen"], begins
