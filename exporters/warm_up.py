"""Warm-up at export: the source model is made ready for shifts that nobody has seen, with labelled source images.

Trained are a change of every weight of convolutions and matrix products, and the affine of the norms. Images are
augmented by AugMix, a family that holds none of the benchmark corruptions, and batches are normalised by their own
statistics, as a device's ports do of a domain. Afterwards the change is split into ViDA pairs, a low-rank one and a
high-rank one for each layer, and merged; what the pairs cannot hold is left out.

Loss: cross-entropy of the plain images, and the Jensen-Shannon divergence between the answers for an image and for its
augmented views (Hendrycks et al., "AugMix", ICLR 2020). The weights that are kept are an average over
most steps (Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018), and lie a
little of the way back to the source (Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models", CVPR 2022).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from edge_adapt.bundle import InputSpec, WarmUp
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.graph import initializers, shapes
from edge_adapt.preprocess import Preprocess
from edge_adapt.streams.data import Dataset
from exporters.adapters import limit_rank
from exporters.augmix import OPERATIONS, AugMix, flipped_and_cropped
from exporters.fisher import fisher, thresholds
from exporters.trainee import Trainee
from exporters.training_state import TrainingState

Array = NDArray[Any]
Tensors = dict[str, Tensor]
Progress = Callable[[str, int, int], None]
Report = Callable[[str], None]

HELD_OUT = 500
"""Images, at most, that are not trained on but measured with; a tenth of the data, at most."""
STATISTICS = 2000
"""Images that the stored statistics are estimated from."""
MIN_IMAGES = 64
RISE = 20
"""Steps until the learning rate is at its peak."""
AFTERWARDS = {"kept", "low", "high"}
"""Settings that change nothing in the training, which may so go on with others."""
BATCH = 50
"""Images in a batch that is measured with, as few as a device may go by."""


@dataclass(frozen=True, kw_only=True)
class WarmUpSettings:
    """Defaults from trials on a CIFAR ResNet-20; see the README."""

    epochs: int = 5
    seed: int = 0
    batch: int = 128
    rate: float = 0.005
    """Learning rate, after a short rise. It stays: the average takes the place of a decay."""
    momentum: float = 0.9
    views: int = 2
    """Augmented views of each image."""
    consistency: float = 12.0
    """Weight of the Jensen-Shannon divergence."""
    severity: float = 5.0
    """Of AugMix."""
    weight_noise: float = 0.1
    """Added to the weights of convolutions at each view, in units of their standard deviation."""
    averaged: float = 0.7
    """Share of the steps, up to the last, whose weights are averaged to those that are kept."""
    kept: float = 0.85
    """Share of the change that is kept: a little less is better on shifts and much better on plain images."""
    low: int = 1
    high: int = 128
    """Ranks of the pairs."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(
                f"--warm-up-epochs is {self.epochs}, expected 1 or more", remedy="leave --warm-up out for none"
            )


@dataclass(frozen=True)
class WarmUpPlan:
    """What `export` is told."""

    data: Dataset
    """Labelled source images."""
    settings: WarmUpSettings = WarmUpSettings()


@dataclass(frozen=True)
class Warmed:
    """A network after its warm-up."""

    network: onnx.ModelProto
    """With the adapters merged."""
    frozen: Tensors
    """Weight -> its value without the merged pair."""
    low: int
    high: int
    """Ranks of the pairs."""
    record: WarmUp
    """For the manifest."""
    source: dict[str, Array]
    """For source.safetensors: Fisher information and thresholds."""


class Images:
    """8-bit images as tensors: uint8 in memory, 0 to 1 for augmentation, and as the network is fed."""

    def __init__(self, spec: InputSpec, images: Array) -> None:
        self.last = spec.layout == "NHWC"
        arranged = np.ascontiguousarray(Preprocess(spec).arranged(images))
        self.raw = torch.from_numpy(arranged)
        if self.last:
            self.raw = self.raw.permute(0, 3, 1, 2)
        self.mean, self.std = (torch.tensor(part).reshape(-1, 1, 1) for part in (spec.mean, spec.std))
        self.scale = 255 / spec.scale

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, places: Tensor | slice) -> Tensor:
        """[n, C, H, W] float32, 0 to 1."""
        return self.raw[places].float() / 255

    def fed(self, images: Tensor) -> Tensor:
        """As the network is fed them, in its layout."""
        made = (images * self.scale - self.mean) / self.std
        return made.permute(0, 2, 3, 1) if self.last else made


def warm_up(
    network: onnx.ModelProto,
    spec: InputSpec,
    plan: WarmUpPlan,
    *,
    checkpoint: Path,
    report: Report = lambda text: None,
    progress: Progress = lambda what, done, total: None,
) -> Warmed:
    """Train, average, split into pairs, merge, and estimate the stored statistics anew.

    Args:
        network: a tidy graph with its norms unfolded.
        checkpoint: rewritten after every epoch, and gone on from if it is of the same run. The caller removes it.
    Raises: ConfigError for a model that is no classifier of images; DataError for data that does not serve.
    """
    data, settings = plan.data, plan.settings
    _check(network, spec, data)
    assert data.images is not None and data.labels is not None
    images, labels = Images(spec, data.images), torch.from_numpy(data.labels)
    held = min(HELD_OUT, len(images) // 10)
    order = torch.randperm(len(images), generator=_generator(settings.seed, 0))
    test, train = order[:held].sort().values, order[held:].sort().values
    trainee = Trainee(network)
    plain = images.fed(images[train[:: max(1, len(train) // STATISTICS)][:STATISTICS]])
    before = _errors(trainee, images, labels, test, settings.severity)
    frozen = {name: value.clone() for name, value in trainee.weights.items()}
    trainee.centre(plain)
    run = {name: value for name, value in asdict(settings).items() if name not in AFTERWARDS}
    run |= {"data": _fingerprint(data), "network": _digest(network.SerializeToString())}
    started = {name: value.clone() for name, value in trainee.parameters.items()}
    state = _resumed(checkpoint, run, report) or TrainingState.start(trainee.parameters)
    while state.epochs < settings.epochs:
        _epoch(trainee, state, images, labels, train, settings, progress)
        state.save(checkpoint, run)
    trainee.set_parameters(
        {name: value.lerp(state.average[name], settings.kept) for name, value in started.items()}
    )
    limit_rank(trainee.weights, frozen, settings.low + settings.high)
    trainee.estimate_statistics(plain)
    after = _errors(trainee, images, labels, test, settings.severity)
    record = WarmUp(
        family="AugMix",
        operations=tuple(OPERATIONS),
        data=_fingerprint(data),
        images=len(train),
        held_out=held,
        settings={name: float(value) for name, value in asdict(settings).items()},
        trained=_trained(trainee),
        clean_error=(before[0], after[0]),
        augmented_error=(before[1], after[1]),
    )
    source = fisher(trainee, plain) | thresholds(trainee, plain)
    return Warmed(trainee.to_network(), frozen, settings.low, settings.high, record, source)


def with_weights(module: nn.Module | None, before: onnx.ModelProto, after: onnx.ModelProto) -> nn.Module | None:
    """A copy of a torch model with the values of a trained graph; None if it has not all of them under those names."""
    if module is None:
        return None
    made = copy.deepcopy(module)
    own = made.state_dict()
    old, new = initializers(before.graph), initializers(after.graph)
    changed = [name for name, value in new.items() if not np.array_equal(value, old[name])]
    if any(name not in own or not np.array_equal(own[name].numpy(), old[name]) for name in changed):
        return None
    made.load_state_dict(own | {name: torch.from_numpy(new[name].copy()) for name in changed})
    return made


def _epoch(
    trainee: Trainee,
    state: TrainingState,
    images: Images,
    labels: Tensor,
    train: Tensor,
    settings: WarmUpSettings,
    progress: Progress,
) -> None:
    """One pass over the images `train`; changes `state`. Its random numbers depend on the seed and the epoch alone."""
    generator = _generator(settings.seed, state.epochs + 1)
    augment = AugMix(severity=settings.severity)
    shuffled = torch.split(train[torch.randperm(len(train), generator=generator)], settings.batch)
    batches = [places for places in shuffled if len(places) == min(settings.batch, len(train))]  # none much smaller
    total = len(batches) * settings.epochs
    trainee.set_parameters(state.value)
    parameters = trainee.parameters
    for index, places in enumerate(batches):
        step = state.epochs * len(batches) + index
        plain = flipped_and_cropped(images[places], generator)
        shown = [plain, *(augment(plain, generator) for _ in range(settings.views))]
        with trainee.batch_statistics():
            answers = [
                trainee.logits(images.fed(part), trainee.shaken(generator, settings.weight_noise)) for part in shown
            ]
        loss = F.cross_entropy(answers[0], labels[places]) + settings.consistency * divergence(answers)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        rate = settings.rate * min(1, (step + 1) / RISE)
        number = step - int((1 - settings.averaged) * total)  # of this step among those that are averaged
        with torch.no_grad():
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True):
                momentum = state.momentum[name].mul_(settings.momentum).add_(gradient)
                value.sub_(rate * (gradient + settings.momentum * momentum))  # Nesterov
                state.average[name].lerp_(value, 1 / max(1, number + 1))
        progress("warm-up", step + 1, total)
    if not all(bool(torch.isfinite(value).all()) for value in parameters.values()):
        raise DataError("the warm-up diverged: weights are not finite", remedy="check the images and their labels")
    state.value = {name: value.detach().clone() for name, value in parameters.items()}
    state.epochs += 1


def divergence(answers: list[Tensor]) -> Tensor:
    """Jensen-Shannon divergence between several answers [N, K] for the same images, mean over the images, in nats."""
    found = [logits.softmax(1) for logits in answers]
    middle = torch.stack(found).mean(0).clamp(1e-7, 1).log()
    return torch.stack([F.kl_div(middle, part, reduction="batchmean") for part in found]).mean()


def _resumed(checkpoint: Path, run: Mapping[str, object], report: Report) -> TrainingState | None:
    found = TrainingState.load(checkpoint, run)
    if isinstance(found, str):
        report(f"the warm-up starts anew: {found}")
        return None
    if found is not None:
        report(f"the warm-up goes on after epoch {found.epochs}")
    return found


def _errors(
    trainee: Trainee, images: Images, labels: Tensor, places: Tensor, severity: float
) -> tuple[float, float]:
    """Error in % of plain images by stored statistics, and of augmented ones by the statistics of their batch."""
    generator, augment = _generator(0, 0), AugMix(severity=severity)
    wrong = [0, 0]
    with torch.no_grad():
        for part in torch.split(places, BATCH):
            plain = images[part]
            wrong[0] += int((trainee.logits(images.fed(plain)).argmax(1) != labels[part]).sum())
            with trainee.batch_statistics():
                answers = trainee.logits(images.fed(augment(plain, generator, shared=True)))
            wrong[1] += int((answers.argmax(1) != labels[part]).sum())
    return tuple(round(100 * count / len(places), 2) for count in wrong)  # type: ignore[return-value]


def _check(network: onnx.ModelProto, spec: InputSpec, data: Dataset) -> None:
    remedy = "warm-up is for classifiers of 8-bit images; export this model without --warm-up"
    if len(spec.shape) != 3 or spec.layout == "NCW" or spec.channels not in (1, 3):
        raise ConfigError(f"the model takes {spec.shape} ({spec.layout}), which is no image", remedy=remedy)
    dims = shapes(network)[network.graph.output[0].name]
    classes = dims[-1]
    if len(dims) != 2 or not isinstance(classes, int) or classes < 2:
        raise ConfigError(f"the model gives {dims}, expected one logit for each class", remedy=remedy)
    if data.images is None or data.labels is None:
        raise DataError(
            f"{data.name} has no labels, which warm-up learns from",
            remedy="give a .npz with `images` and `labels`, or a folder with one folder for each class",
        )
    if data.images.dtype != np.uint8:
        raise DataError(f"{data.name} holds {data.images.dtype}, warm-up takes 8-bit images", remedy=remedy)
    if len(data.images) < MIN_IMAGES:
        raise DataError(
            f"{data.name} holds {len(data.images)} images, warm-up takes {MIN_IMAGES} or more", remedy="give more"
        )
    if data.labels.min() < 0 or data.labels.max() >= classes:
        raise DataError(
            f"{data.name} has labels from {data.labels.min()} to {data.labels.max()}, the model knows 0 to "
            f"{classes - 1}",
            remedy="give the data that the model was trained on",
        )


def _trained(trainee: Trainee) -> tuple[str, ...]:
    layers = [name for name, value in trainee.weights.items() if value.ndim > 1]
    return (
        f"a low-rank and a high-rank pair on {len(layers)} layers, merged",
        f"the affine of {len(trainee.norms) // 2} norms",
    )


def _fingerprint(data: Dataset) -> str:
    assert data.images is not None and data.labels is not None
    return f"{data.name} sha256:{_digest(data.images.tobytes(), data.labels.tobytes())}"


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def _generator(seed: int, epoch: int) -> Generator:
    return Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
