"""Domains told apart by what frames look like inside the network, strangers told from source frames, and the cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.engines.protocol import Observed
from edge_adapt.errors import ConfigError
from edge_adapt.preprocess import Preprocess, resized
from edge_adapt.routing import scores
from edge_adapt.routing.bank import Bank
from edge_adapt.routing.codes import packed
from edge_adapt.routing.encoder import Encoder
from edge_adapt.routing.mixed import gain
from edge_adapt.routing.router import RouterConfig
from edge_adapt.streams.corruptions import CORRUPTIONS, corrupt
from edge_adapt.streams.data import archive
from edge_adapt.streams.folders import images_in_order
from edge_adapt.taps import normalised

Array = NDArray[Any]
Progress = Callable[[str, int, int], None]

CLEAN = "clean"
WINDOWS = 1, 16, 64
WIDTHS = (4096,)
"""Tried beside that of the bundle's encoder."""
SHAPE, CLASSES = (3, 32, 32), 10
NOT_FOREIGN = ("pickup_truck",)
"""CIFAR-100 classes that show what a CIFAR-10 class names."""
PAIRS = "usps", "uniform_noise", "imagenet", "cifar100"
"""Those that an average is over; noise of another kind is shown beside them."""
BATCH = 50
ENTRIES = 8, 1000
"""Of the banks that a window is routed in."""


@dataclass(frozen=True)
class Plan:
    data_root: Path
    frames: int = 800
    """Of each domain; half of them make the centroid."""
    usual: int = 2000
    """Source frames that strangers are told from."""
    severities: tuple[int, ...] = (5, 3)
    seed: int = 0
    rounds: int = 40
    """How often each cost is timed."""


@dataclass
class Look:
    """What frames gave with source weights."""

    taps: tuple[Array, Array]
    logits: Array
    features: Array | None


@dataclass
class Eye:
    """A bundle's engine with source weights."""

    bundle: Bundle
    engine: OnnxRuntimeEngine
    prepare: Preprocess = field(init=False)

    def __post_init__(self) -> None:
        self.prepare = Preprocess(self.bundle.manifest.input)

    def __call__(self, images: Array) -> Look:
        head = self.bundle.manifest.head is not None
        seen = [
            self.engine.observe(self.prepare(images[start : start + BATCH]), taps=True, features=head)
            for start in range(0, len(images), BATCH)
        ]
        parts = [normalised(self.bundle, part.taps) for part in seen if part.taps is not None]
        mean, second = (np.concatenate(part) for part in zip(*parts, strict=True))
        features = np.concatenate([part.features for part in seen if part.features is not None]) if head else None
        return Look((mean, second), np.concatenate([part.logits for part in seen]), features)


def routing(bundle: Bundle, plan: Plan, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """All figures of one bundle; of a network that is not for CIFAR-10, only the cost.

    Raises: ConfigError for a bundle without an encoder or scores.
    """
    encoder, judge = Encoder.of(bundle), scores.load(bundle)
    engine = OnnxRuntimeEngine(bundle)
    try:
        eye = Eye(bundle, engine)
        made: dict[str, Any] = {"bundle": bundle.manifest.name, "id": bundle.id, "seed": plan.seed}
        if bundle.manifest.input.shape == SHAPE and bundle.manifest.outputs == CLASSES:
            made["domains"] = domains(eye, encoder, plan, progress)
            made["strangers"] = strangers(eye, plan, progress)
        progress("cost", 0, 1)
        return made | {"cost": cost(eye, encoder, judge, plan)}
    finally:
        engine.close()


def domains(eye: Eye, encoder: Encoder, plan: Plan, progress: Progress) -> list[dict[str, Any]]:
    """Routing accuracy of every severity, encoder and length of window."""
    variants = {f"{encoder.width}": encoder}
    variants |= {f"{width}": replace(encoder, width=width) for width in WIDTHS if width != encoder.width}
    rows = []
    for severity in plan.severities:
        taps = {}
        for place, (name, images) in enumerate(domain_images(plan, severity)):
            progress(f"severity {severity}", place, 1 + len(CORRUPTIONS))
            taps[name] = eye(images).taps
        for name, variant in variants.items():
            encodings = {domain: variant(part) for domain, part in taps.items()}
            signs = {domain: np.sign(part) / np.sqrt(variant.width) for domain, part in encodings.items()}
            for kind, given in (("floats", encodings), ("signs", signs)):
                rows += [
                    {"severity": severity, "width": int(name), "kind": kind} | routed(given, window)
                    for window in WINDOWS
                ]
    return rows


def routed(encodings: dict[str, Array], window: int) -> dict[str, Any]:
    """Nearest centroid of the first halves, for windows of the second halves [n, width]; confusions with counts."""
    names = list(encodings)
    halves = {name: np.array_split(part, 2) for name, part in encodings.items()}
    centroids = np.stack([first.mean(axis=0) for first, _ in halves.values()])
    confused: Counter[tuple[str, str]] = Counter()
    right = total = 0
    worst: dict[str, float] = {}
    for name, (_, second) in halves.items():
        count = len(second) // window
        means = second[: count * window].reshape(count, window, -1).mean(axis=1)
        found = np.square(means[:, None] - centroids).sum(axis=-1).argmin(axis=1)
        hits = int((found == names.index(name)).sum())
        right, total, worst[name] = right + hits, total + count, hits / max(count, 1)
        confused.update((name, names[place]) for place in found if names[place] != name)
    return {
        "window": window,
        "windows": total,
        "accuracy": right / total,
        "by_domain": worst,
        "confused": [{"true": a, "taken_for": b, "windows": n} for (a, b), n in confused.most_common(8)],
    }


def strangers(eye: Eye, plan: Plan, progress: Progress) -> dict[str, Any]:
    """AUROC of every score on every pair, and the share of source test frames below each threshold."""
    usual = eye(archive(plan.data_root / "cifar10_test.npz")[: plan.usual].images)  # type: ignore[arg-type]
    foreign = {}
    for place, (name, images) in enumerate(foreign_images(plan)):
        progress("strangers", place, 5)
        foreign[name] = eye(images)
    rows: list[dict[str, Any]] = []
    for name in scores.SCORES:
        try:
            judge = scores.load(eye.bundle, name)
        except ConfigError as error:
            rows.append({"score": name, "status": f"skipped: {error.what}"})
            continue
        values = judge(usual.logits, usual.features)
        found = {pair: auroc(values, judge(look.logits, look.features)) for pair, look in foreign.items()}
        rows.append({
            "score": name,
            "status": "ok",
            "auroc": found,
            "mean": float(np.mean([found[pair] for pair in PAIRS])),
            "accepted": float((values <= judge.threshold).mean()),
        })
    return {"frames": {name: len(look.logits) for name, look in foreign.items()}, "rows": rows}


def cost(eye: Eye, encoder: Encoder, judge: scores.Judge, plan: Plan) -> list[dict[str, Any]]:
    """Median milliseconds, in turns, of the plain network and of what is added to it, for 1 and 16 frames."""
    rows = []
    for count in (1, 16):
        frames = np.random.default_rng(plan.seed).standard_normal((count, *eye.bundle.manifest.input.shape))
        frames = frames.astype(np.float32)
        seen = eye.engine.observe(frames, taps=True, features=eye.bundle.manifest.head is not None)
        cases = _cases(eye, encoder, judge, frames, seen)
        times: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(plan.rounds + 3):
            for name, case in cases.items():
                begun = time.perf_counter()
                case()
                if turn >= 3:
                    times[name].append(1000 * (time.perf_counter() - begun))
        medians = {name: float(np.median(part)) for name, part in times.items()}
        shares = {name: value / medians["network"] for name, value in medians.items()}
        rows.append({"frames": count, "median_ms": medians, "share": shares})
    return rows


def _cases(
    eye: Eye, encoder: Encoder, judge: scores.Judge, frames: Array, seen: Observed
) -> dict[str, Callable[[], Any]]:
    assert seen.taps is not None
    taps = normalised(eye.bundle, seen.taps)
    codes = encoder(taps)
    routes = {}
    if len(frames) > 1:  # a window is routed as one
        routes = {f"route, {count:,} entries": _routed_among(count, encoder, codes) for count in ENTRIES}
    return {
        "network": lambda: eye.engine.run(frames),
        "encode": lambda: encoder(taps),
        "pack": lambda: packed(codes),
        "score": lambda: judge(seen.logits, seen.features),
        **routes,
    }


def _routed_among(count: int, encoder: Encoder, window: Array) -> Callable[[], Any]:
    """What the router asks of a full window [n, width], in a bank of so many entries beside source."""
    rng, near = np.random.default_rng(count), RouterConfig().near
    bank = Bank.of(encoder.source, encoder.frames, None)
    for _ in range(count):
        encodings = rng.standard_normal((len(window), encoder.width)).astype(np.float32)
        bank = bank.grown(encodings / np.linalg.norm(encodings, axis=1, keepdims=True), None, now=0)

    def route() -> tuple[float, tuple[int, float]]:
        fresh = replace(bank)  # as after the window before, which changed it
        return gain(fresh, window, near), fresh.nearest(window)

    return route


def auroc(usual: Array, strange: Array) -> float:
    """Chance that a strange frame scores higher than a usual one; ties count half."""
    ordered = np.sort(usual)
    below = np.searchsorted(ordered, strange, "left") + np.searchsorted(ordered, strange, "right")
    return float(below.mean() / (2 * len(usual)))


def domain_images(plan: Plan, severity: int) -> Iterator[tuple[str, Array]]:
    """Clean and the fifteen corruptions of the same images; severity 5 as published, others made here."""
    clean = archive(plan.data_root / "cifar10_test.npz")[: plan.frames].images
    assert clean is not None
    yield CLEAN, clean
    ready = archive(plan.data_root / "cifar10_c_sev5.npz").shifts if severity == 5 else {}
    for name in CORRUPTIONS:
        made = ready[name][: plan.frames] if name in ready else corrupt(clean, name, severity, seed=plan.seed)
        yield name, made.astype(np.uint8)


def foreign_images(plan: Plan) -> Iterator[tuple[str, Array]]:
    """What no CIFAR-10 class shows, [N, 32, 32, 3]."""
    size = SHAPE[1], SHAPE[2]
    with np.load(plan.data_root / "digits_mnist_usps_test.npz", allow_pickle=False) as file:
        digits = file["usps_images"]
    yield "usps", np.stack([resized(image[..., None].repeat(3, axis=-1), size) for image in digits])
    rng = np.random.default_rng(plan.seed)
    yield "uniform_noise", rng.integers(0, 256, (1000, *size, 3), dtype=np.uint8)
    yield "gaussian_noise", np.clip(rng.normal(128, 64, (1000, *size, 3)), 0, 255).astype(np.uint8)
    images = images_in_order(plan.data_root / "imagenet_1k_samples").images
    assert images is not None
    yield "imagenet", np.stack([resized(image, size) for image in images])
    with np.load(plan.data_root / "cifar100_subset_3k.npz", allow_pickle=False) as file:
        known = [place for place, name in enumerate(file["class_names"]) if str(name) in NOT_FOREIGN]
        yield "cifar100", file["images"][~np.isin(file["labels"], known)]


def tables(made: dict[str, Any]) -> str:
    """What `routing` gave, for a terminal."""
    lines = [made["bundle"]]
    for row in made.get("domains", ()):
        head = f"  severity {row['severity']}  {row['width']:>5} {row['kind']:>6}  window {row['window']:>2}"
        pairs = ", ".join(f"{item['true']}>{item['taken_for']} {item['windows']}" for item in row["confused"][:4])
        lines.append(f"{head}  {100 * row['accuracy']:5.1f} % of {row['windows']:>4}  {pairs}")
    for row in made.get("strangers", {"rows": ()})["rows"]:
        if row["status"] != "ok":
            lines.append(f"  {row['score']:>17}  {row['status']}")
            continue
        cells = "  ".join(f"{pair} {value:.3f}" for pair, value in row["auroc"].items())
        lines.append(f"  {row['score']:>17}  {cells}  mean {row['mean']:.3f}  accepted {row['accepted']:.3f}")
    for row in made["cost"]:
        cells = "  ".join(
            f"{name} {value:.3f} ms ({100 * row['share'][name]:.1f} %)" for name, value in row["median_ms"].items()
        )
        lines.append(f"  {row['frames']:>2} frames  {cells}")
    return "\n".join(lines)
