"""What methods need to know of the source model besides its statistics: Fisher information, and thresholds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from exporters.trainee import Trainee

Array = NDArray[Any]

BATCH = 50
CONFIDENCE_QUANTILE = 0.05
"""Of the source model's confidence in source frames: below it CoTTA makes augmented views."""


def fisher(trainee: Trainee, frames: Tensor) -> dict[str, Array]:
    """`fisher/<parameter>` for the affine of every norm, as EATA anchors it.

    Squared gradients of the cross-entropy with the predicted classes, of the mean over each batch, averaged over the
    batches; normalised by the statistics of the batch, as the weights are used later (Niu et al., "Efficient
    Test-Time Model Adaptation without Forgetting", ICML 2022).

    Args:
        frames: source frames as the network is fed them, [N, ...].
    """
    norms = trainee.norms
    for value in norms.values():
        value.requires_grad_(True)
    sums = {name: torch.zeros_like(value) for name, value in norms.items()}
    batches = torch.split(frames, BATCH)
    for part in batches:
        with trainee.batch_statistics():
            logits = trainee.logits(part)
        loss = F.cross_entropy(logits, logits.detach().argmax(1))
        for name, gradient in zip(norms, torch.autograd.grad(loss, list(norms.values())), strict=True):
            sums[name] += gradient.square()
    return {f"fisher/{name}": (total / len(batches)).numpy() for name, total in sums.items()}


def thresholds(trainee: Trainee, frames: Tensor) -> dict[str, Array]:
    """`threshold/confidence`: a low quantile of the largest probability, over frames."""
    with torch.no_grad():
        found = torch.cat([trainee.logits(part).softmax(1).amax(1) for part in torch.split(frames, BATCH)])
    return {"threshold/confidence": found.quantile(CONFIDENCE_QUANTILE).reshape(1).numpy()}
