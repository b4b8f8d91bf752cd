"""Everything about domains in one go: routing, strangers and cost, accuracy told without labels, choice of adapters.

`python -m benchmarks.domains DATA` writes a JSON file a part into benchmarks/results/domains, and the page beside them.
Stopped, it goes on behind the last part that was done; delete a file to have it made again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.sweep_report import markdown
from edge_adapt.delta import write_atomically

OUT, WORK = Path("benchmarks/results/domains"), Path("runs/domains")
PAGE = "README.md"
MODELS = {
    "resnet20": ("zoo:cifar-resnet20", "models/cifar10_resnet20.safetensors", "cifar10_train_10k.npz", True),
    "efficientnet-lite0": ("zoo:efficientnet-lite0", None, "imagenet_1k_samples", False),
    "resnet56": ("zoo:cifar-resnet56", "models/cifar10_resnet56.safetensors", "cifar10_train_10k.npz", False),
}
"""Name -> model, weights and calibration below the data folder, and whether accuracy is told of it."""
ROUTED = "resnet20", "efficientnet-lite0"
"""Models by which domains are told apart."""
WEIGHED = "moments", "auto", "tent", "cotta"
"""Methods whose entries are weighed, on ResNet-56."""
SCENARIOS = (
    "continual", "recurring", "correlated", "mixed_domains", "mixed_domains_correlated", "label_shift", "burst",
    "contaminated_30",
)  # fmt: skip
Part = dict[str, Any]


def run(data_root: Path, out: Path = OUT, work: Path = WORK, *, short: bool = False) -> None:
    """Make what is missing. `short`: few frames, to see that it works. Raises: EdgeAdaptError."""
    for name, make in parts(data_root, work, short=short).items():
        path = out / f"{name}.json"
        if path.exists():
            continue
        print(f"{name} ...", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(make(), indent=1) + "\n").encode())
    write_atomically(out / PAGE, page(out).encode())


def parts(data_root: Path, work: Path, *, short: bool = False) -> dict[str, Callable[[], Part]]:
    """Name -> what makes it."""
    from benchmarks.accuracy import accuracy
    from benchmarks.bank import Plan as BankPlan
    from benchmarks.bank import endless, weighed
    from benchmarks.choice import Choice, choice
    from benchmarks.routing import Plan, routing
    from edge_adapt.streams.data import load_data

    cifar = str(data_root / "cifar10_c_sev5.npz")

    def told_of(scenario: str) -> Part:
        bundle = _bundle("resnet20", data_root, work)
        made = accuracy(bundle, load_data(cifar), scenario=scenario, limit=256 if short else None)
        return {name: part for name, part in made.items() if name != "rows"}

    def chosen() -> Part:
        plan = Choice(train=64, test=64, steps=2, limit=4) if short else Choice()
        return choice(_bundle("resnet20", data_root, work), load_data(str(data_root / "cifar10_test.npz")), plan)

    def images() -> Any:
        return load_data(str(data_root / "cifar10_test.npz")).images

    banks = BankPlan(frames=600, every=200) if short else BankPlan()
    plan = Plan(data_root, frames=128, usual=200, severities=(5,), rounds=2) if short else Plan(data_root)
    made: dict[str, Callable[[], Part]] = {
        f"routing-{name}": lambda name=name: routing(_bundle(name, data_root, work), plan)  # type: ignore[misc]
        for name in ROUTED
    }
    made["bank-resnet56"] = lambda: weighed(_bundle("resnet56", data_root, work), images(), WEIGHED, banks)
    made["endless-resnet20"] = lambda: endless(_bundle("resnet20", data_root, work), images(), "moments", banks)
    for scenario in SCENARIOS[:1] if short else SCENARIOS:
        made[f"accuracy-{scenario}"] = lambda scenario=scenario: told_of(scenario)  # type: ignore[misc]
    return made | {"choice": chosen}


def _bundle(name: str, data_root: Path, work: Path) -> Any:
    from edge_adapt.bundle import MANIFEST, Bundle
    from exporters.cli import export

    folder = work / name
    if not (folder / MANIFEST).exists():
        model, weights, calibration, told = MODELS[name]
        work.mkdir(parents=True, exist_ok=True)
        export(
            model=model,
            out=folder,
            weights=None if weights is None else data_root / weights,
            calibration=str(data_root / calibration),
            estimate=told,
        )
    return Bundle.load(folder)


def page(out: Path) -> str:
    """The tables, as Markdown, of the files that are there."""
    made = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    sections = (
        ("Windows that go to the right entry", list(_routed(made))),
        ("Strangers told from source frames, AUROC", list(_strangers(made))),
        ("What it costs, beside a frame's answer", list(_cost(made))),
        ("What a bank takes", list(_kept(made))),
        ("A new domain again and again", list(_endless(made))),
        ("Accuracy told without labels", list(_told(made))),
        ("Choice of adapters by the score, against training", list(_chosen(made))),
    )
    parts = ["# Domains", "Made by `make domains`, ResNet-20 on CIFAR-10 unless said."]
    parts += [f"## {title}\n\n{markdown(lines)}" for title, lines in sections if len(lines) > 2]
    return "\n\n".join(parts) + "\n"


Lines = Iterator[list[str]]


def _head(*cells: str, left: int = 1) -> Lines:
    yield list(cells)
    yield ["---"] * left + ["---:"] * (len(cells) - left)


def _routed(made: dict[str, Part]) -> Lines:
    yield from _head("severity", "dimensions", "kind", "window", "right %", "taken for another", left=3)
    for row in (row for part in _of(made, "routing-") for row in part.get("domains", ())):
        pairs = ", ".join(f"{item['true']} for {item['taken_for']} {item['windows']} x" for item in row["confused"][:3])
        kind = [str(row["severity"]), str(row["width"]), row["kind"], str(row["window"])]
        yield [*kind, f"{100 * row['accuracy']:.1f}", pairs]


def _strangers(made: dict[str, Part]) -> Lines:
    rows = [row for part in _of(made, "routing-") for row in part.get("strangers", {"rows": ()})["rows"]]
    good = [row for row in rows if row["status"] == "ok"]
    pairs = list(good[0]["auroc"]) if good else []
    yield from _head("score", *pairs, "mean", "test images accepted %")
    for row in good:
        figures = [f"{row['auroc'][pair]:.3f}" for pair in pairs]
        yield [row["score"], *figures, f"{row['mean']:.3f}", f"{100 * row['accepted']:.1f}"]


def _cost(made: dict[str, Part]) -> Lines:
    yield from _head("model", "frames", "what", "ms", "share %", left=3)
    for part in _of(made, "routing-"):
        for row in part["cost"]:
            for name, value in row["median_ms"].items():
                yield [part["bundle"], str(row["frames"]), name, f"{value:.3f}", f"{100 * row['share'][name]:.2f}"]


def _kept(made: dict[str, Part]) -> Lines:
    yield from _head("model", "method", "kB an entry", left=2)
    for part in _of(made, "bank-"):
        for row in part["entries"]:
            yield [part["bundle"], row["method"], f"{row['bytes'] / 1000:.1f}"]


def _endless(made: dict[str, Part]) -> Lines:
    yield from _head(
        "model", "method", "frames", "domains", "founded", "entries at most", "kB at most",
        "MB of the process after a tenth", "at the end", left=2,
    )  # fmt: skip
    for row in _of(made, "endless-"):
        memory = row["resident_mb"]
        told = ["-" if value is None else f"{value:.0f}" for value in (memory[len(memory) // 10], memory[-1])]
        counts = [f"{row[name]:,}" for name in ("frames", "domains", "founded", "entries")]
        yield [row["bundle"], row["method"], *counts, f"{row['bytes'] / 1000:.0f}", *told]


def _told(made: dict[str, Part]) -> Lines:
    yield from _head(
        "scenario", "method", "windows", "points off", "bias", "truth inside %", "width", "collapses seen", left=2
    )
    for part in _of(made, "accuracy-"):
        for row in part["summary"]:
            if row["method"] == "all":
                continue
            found = [item["seen_after"] for item in part["collapses"] if item["method"] == row["method"]]
            seen = [frames for frames in found if frames is not None]
            yield [
                part["scenario"], row["method"], str(row["windows"]), f"{100 * row['error']:.1f}",
                f"{100 * row['bias']:+.1f}", f"{100 * row['held']:.0f}", f"{100 * row['width']:.0f}",
                f"{len(seen)} of {len(found)}" + (f", within {max(seen)}" if seen else ""),
            ]  # fmt: skip


def _chosen(made: dict[str, Part]) -> Lines:
    yield from _head("corruption", "way", "Spearman", "Kendall", "first: accuracy %", "best", "average", "none", left=2)
    for domain in (domain for part in _of(made, "choice") for domain in part["domains"]):
        for way, row in domain["ways"].items():
            ranks = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("spearman", "kendall")]
            figures = [f"{row[name]:.1f}" for name in ("accuracy", "best", "average")]
            yield [domain["name"], way, *ranks, *figures, f"{domain['untrained']:.1f}"]


def _of(made: dict[str, Part], start: str) -> list[Part]:
    return [part for name, part in made.items() if name.startswith(start)]


if __name__ == "__main__":
    run(Path(sys.argv[1]), short="--short" in sys.argv[2:])
