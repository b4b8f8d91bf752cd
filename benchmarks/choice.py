"""Does the score of adaptor choice foretell what training gives? Its ranks against those of trained candidates.

For each corruption, moments follow the first frames as they would on a device; what the trunk then says at the cut is
what adapters are scored and trained on. Every candidate is trained for a few steps with labels, at more than one
learning rate, of which the best counts, and is scored on other frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.replay import Progress, check_labels
from benchmarks.scenarios import Shift, corrupted
from edge_adapt.adapters.ssf import SSF
from edge_adapt.bundle import Bundle
from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.optim import AdamState, adam, gradients_of, leaves
from edge_adapt.methods.protocol import Context
from edge_adapt.preprocess import Preprocess
from edge_adapt.routing.candidates import Candidate, candidates
from edge_adapt.routing.choice import SPECTRUM, Scored, choose, score
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.streams.data import Dataset
from edge_adapt.tail import Ports, Tail

Array = NDArray[Any]

SCHEMA = 1
CHUNK = 100
"""Frames that are answered at a time."""
FOLLOWERS = ("source", "moments")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to run."""

    corruptions: tuple[str, ...] = ("gaussian_noise", "frost", "pixelate")
    severity: int = 5
    train: int = 600
    """Frames of each corruption that are trained on; the first of them are scored."""
    test: int = 800
    steps: int = 24
    batch_size: int = 32
    rates: tuple[float, ...] = (1e-3, 3e-3)
    """Learning rates of Adam."""
    limit: int | None = 36
    """Candidates, drawn from all; None for all."""
    under: str = "moments"
    """What answers while the frames at the cut are made: `source` or `moments`."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "test", "steps", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ConfigError(f"{name} is {value}, expected 2 or more", remedy="use the default")
        if self.under not in FOLLOWERS:
            raise ConfigError(f"under is {self.under!r}", remedy=f"known: {', '.join(FOLLOWERS)}")
        if not self.rates or min(self.rates) <= 0:
            raise ConfigError(f"rates are {self.rates}, expected some above 0", remedy="use the default")


@dataclass(frozen=True)
class Domain:
    """One corruption, as the tail sees it."""

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    ports: Ports | None


def choice(
    bundle: Bundle, data: Dataset, plan: Choice, *, progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Score, train and compare.

    Returns: JSON-able figures, accuracies in per cent.
    Raises: ConfigError for a bundle cut at its input, DataError for too few labelled frames.
    """
    if bundle.is_reference:
        raise ConfigError(
            f"bundle {bundle.manifest.name!r} is cut at its input, there is no frozen trunk",
            remedy="export it with another cut",
        )
    check_labels(bundle, data)
    tail = Tail(bundle)
    among = _drawn(candidates(tail), plan)
    engine = OnnxRuntimeEngine(bundle)
    made = []
    try:
        for shift in corrupted(_enough(data, plan), plan.severity, plan.seed, plan.corruptions):
            domain = _domain(bundle, engine, tail, shift, plan)
            made.append(_compared(tail, domain, among, plan, progress))
    finally:
        engine.close()
    if not made:
        raise DataError(f"{data.name} has none of {', '.join(plan.corruptions)}", remedy="name shifts that it has")
    return {
        "schema": SCHEMA,
        "bundle": {"name": bundle.manifest.name, "id": bundle.id},
        "data": data.name,
        "settings": asdict(plan),
        "environment": environment(1, engine.description),
        "domains": made,
    }


def _drawn(every: Sequence[Candidate], plan: Choice) -> list[Candidate]:
    count = min(plan.limit or len(every), len(every))
    chosen = np.random.default_rng(plan.seed).choice(len(every), count, replace=False)
    return [every[index] for index in sorted(chosen)]


def _enough(data: Dataset, plan: Choice) -> Dataset:
    """As many frames as are needed, drawn from all."""
    needed = plan.train + plan.test
    if len(data) < needed:
        raise DataError(
            f"{data.name} has {len(data)} frames, {plan.train} to train and {plan.test} to score are asked for",
            remedy="ask for fewer",
        )
    return data[np.random.default_rng(plan.seed).permutation(len(data))[:needed]]


def _domain(bundle: Bundle, engine: OnnxRuntimeEngine, tail: Tail, shift: Shift, plan: Choice) -> Domain:
    """Let moments follow the frames to train on, and take everything at the cut with what they found in force."""
    if shift.labels is None:
        raise DataError(f"{shift.name} has no labels", remedy="give data with `labels`")
    preprocess, predictor = Preprocess(bundle.manifest.input), Predictor(bundle, engine)
    method = build(plan.under, Context(bundle, lambda: tail, plan.seed))
    train, test = (
        [preprocess(images[at : at + CHUNK]) for at in range(0, len(images), CHUNK)]
        for images in (shift.images[: plan.train], shift.images[plan.train :])
    )
    for _ in adapt(predictor, method, train):
        pass
    delta = predictor.delta
    ports = (torch.tensor(delta[PORT_SCALE]), torch.tensor(delta[PORT_SHIFT])) if PORT_SCALE in delta else None
    learned, scored = (torch.tensor(np.concatenate([predictor.trunk(x) for x in part])) for part in (train, test))
    predictor.apply(Delta.source())
    labels = torch.tensor(np.asarray(shift.labels, np.int64))
    return Domain(shift.name, learned, labels[: plan.train], scored, labels[plan.train :], ports)


def _compared(
    tail: Tail, domain: Domain, among: Sequence[Candidate], plan: Choice, progress: Progress
) -> dict[str, Any]:
    """Accuracy of every candidate, and how well each way of scoring ranks them."""
    scores: dict[str, dict[str, Scored]] = {}
    for way in ("gradients", "forward"):
        table = choose(tail, domain.train, among=among, ports=domain.ports, way=way, seed=plan.seed)
        scores[way] = {row.candidate.name: row for row in table}
    trained = {}
    for number, candidate in enumerate(among):
        trained[candidate.name] = max(_trained(tail, domain, candidate, rate, plan) for rate in plan.rates)
        progress(domain.name, number + 1, len(among))
    orders: dict[str, dict[str, float]] = {
        **{way: {name: row.score for name, row in rows.items()} for way, rows in scores.items()},
        "spectrum alone": {n: score(row.measured, row.cost, SPECTRUM) for n, row in scores["gradients"].items()},
        "most parameters": {name: row.cost.parameters for name, row in scores["forward"].items()},
        "most bytes": {name: row.cost.bytes_per_frame for name, row in scores["forward"].items()},
    }
    return {
        "name": domain.name,
        "untrained": _accuracy(tail, domain, Candidate("none", SSF()), {}),
        "ways": {way: judged(found, trained) for way, found in orders.items()},
        "candidates": [_row(candidate.name, trained, scores) for candidate in among],
    }


def judged(found: Mapping[str, float], trained: Mapping[str, float]) -> dict[str, Any]:
    """How the ranks agree, and what the first choice is worth against the best and the average candidate."""
    names = list(trained)
    one, other = [found[name] for name in names], [trained[name] for name in names]
    told_apart = len(set(one)) > 1 and len(set(other)) > 1
    first = max(names, key=lambda name: found[name])
    return {
        "spearman": _finite(stats.spearmanr(one, other).statistic) if told_apart else None,
        "kendall": _finite(stats.kendalltau(one, other).statistic) if told_apart else None,
        "first": first,
        "accuracy": trained[first],
        "best": max(other),
        "average": round(float(np.mean(other)), 2),
    }


def _row(name: str, trained: Mapping[str, float], scores: Mapping[str, Mapping[str, Scored]]) -> dict[str, Any]:
    taken = scores["gradients"][name].cost
    return {
        "name": name,
        "parameters": taken.parameters,
        "bytes_per_frame": taken.bytes_per_frame,
        "accuracy": trained[name],
        **{way: _finite(rows[name].score) for way, rows in scores.items()},
        "measured": {way: asdict(rows[name].measured) for way, rows in scores.items()},
    }


def _trained(tail: Tail, domain: Domain, candidate: Candidate, rate: float, plan: Choice) -> float:
    """Accuracy after a few steps of Adam on cross entropy; 0 where it ran away."""
    values, state = candidate.start(plan.seed), AdamState()
    order = torch.Generator().manual_seed(plan.seed)
    for _ in range(plan.steps):
        rows = torch.randperm(len(domain.train), generator=order)[: plan.batch_size]
        moving = leaves(values)
        logits = candidate.run(tail, moving, domain.train[rows], domain.ports)
        loss = torch.nn.functional.cross_entropy(logits, domain.train_labels[rows])
        values, state = adam(values, gradients_of(loss, moving), state, lr=rate)
    return _accuracy(tail, domain, candidate, values)


def _accuracy(tail: Tail, domain: Domain, candidate: Candidate, values: Mapping[str, Tensor]) -> float:
    """On the frames kept aside, in per cent."""
    right = 0
    with torch.no_grad():
        for at in range(0, len(domain.test), CHUNK):
            logits = candidate.run(tail, values, domain.test[at : at + CHUNK], domain.ports)
            right += int((logits.argmax(1) == domain.test_labels[at : at + CHUNK]).sum())
    return round(100 * right / len(domain.test), 2)


def _finite(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return round(float(value), 4) if np.isfinite(value) else None


def table(results: dict[str, Any]) -> str:
    """What `choice` found, as plain text."""
    settings = results["settings"]
    lines = [
        f"{results['bundle']['name']}, {len(results['domains'][0]['candidates'])} candidates, "
        f"{settings['steps']} steps on {settings['train']} labelled frames, under {settings['under']}",
        f"{'':>18}{'':>20}{'spearman':>10}{'kendall':>10}{'first':>8}{'best':>8}{'average':>9}{'none':>8}",
    ]
    for domain in results["domains"]:
        for way, row in domain["ways"].items():
            ranks = "".join("-".rjust(10) if row[k] is None else f"{row[k]:10.2f}" for k in ("spearman", "kendall"))
            lines.append(
                f"{domain['name']:>18}{way:>20}{ranks}{row['accuracy']:8.1f}{row['best']:8.1f}{row['average']:9.1f}"
                f"{domain['untrained']:8.1f}"
            )
    return "\n".join(lines)
