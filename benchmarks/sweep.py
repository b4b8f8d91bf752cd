"""Every method on every model, in both modes: cells kept as they are made, so that a run that was stopped goes on.

A board is one model in one mode on one stream; a cell is one method with one seed on it. Each cell runs in a process of
its own, with plain inference beside it, so that its time is a ratio and its memory nobody else's.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_adapt.delta import write_atomically
from edge_adapt.errors import ArtifactError, ConfigError, DataError, EdgeAdaptError, did_you_mean
from edge_adapt.methods.auto import AUTO
from edge_adapt.plugins import METHODS, names

SCHEMA = 1
BASELINE = "source"
WRAPPED = ("moments+label_shift", "moments+lame", "moments+t3a")
"""Compositions that are shown beside the methods themselves."""
MANY_VIEWS = ("cotta", "vida")
"""Methods that take minutes in reference mode: one seed."""
Cell = dict[str, Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Board:
    """One model in one mode on one stream."""

    id: str
    """For ever: another stream, another id."""
    model: str
    weights: str | None
    """Below the data folder; None for those that come with the model's package."""
    calibration: str
    data: str
    cut: str | None = None
    limit: int | None = None
    severity: int = 5
    batch_size: int = 50
    methods: tuple[str, ...] | None = None
    """None: all that are installed."""
    seeds: tuple[int, ...] = (0,)
    warm_up: bool = False

    @property
    def is_reference(self) -> bool:
        return self.cut == "input"

    def cells(self) -> list[tuple[str, int]]:
        """Method and seed of every cell, the frozen model first."""
        methods = self.methods or (AUTO, *names(METHODS), *WRAPPED)
        ordered = sorted(methods, key=lambda name: (name != BASELINE, name in MANY_VIEWS))
        return [
            (method, seed)
            for method in ordered
            for seed in (self.seeds[:1] if self.is_reference and method in MANY_VIEWS else self.seeds)
        ]


def _cifar(model: str, weights: str, **facts: Any) -> Board:
    return Board(
        model=f"zoo:{model}",
        weights=f"models/{weights}.safetensors",
        calibration="cifar10_train_10k.npz",
        data="cifar10_c_sev5.npz",
        **facts,
    )


def _imagenet(**facts: Any) -> Board:
    return Board(
        model="zoo:efficientnet-lite0",
        weights=None,
        calibration="imagenet_1k_samples",
        data="imagenet_1k_samples",
        limit=200,
        severity=3,
        **facts,
    )


RESNET20 = "cifar-resnet20", "cifar10_resnet20"
RESNET56 = "cifar-resnet56", "cifar10_resnet56"
RESNET8 = "mlperf-resnet8", "cifar10_resnet8_mlperftiny"
FEW = ("source", "tent", "roid")
WARM = ("source", "auto", "moments", "tent", "cotta", "vida", "lae")
BOARDS = {
    board.id: board
    for board in (
        _cifar(*RESNET20, id="resnet20-device", seeds=(0, 1, 2)),
        _cifar(*RESNET20, id="resnet20-reference", cut="input", seeds=(0, 1, 2)),
        _cifar(*RESNET20, id="resnet20-device-warm", methods=WARM, seeds=(0, 1, 2), warm_up=True),
        _cifar(*RESNET8, id="resnet8-device"),
        _cifar(*RESNET8, id="resnet8-reference", cut="input", methods=FEW),
        _cifar(*RESNET56, id="resnet56-device"),
        _cifar(*RESNET56, id="resnet56-device-warm", methods=WARM, warm_up=True),
        _imagenet(id="efficientnet-lite0-device"),
        _imagenet(id="efficientnet-lite0-reference", cut="input", methods=("source", "tent")),
        _cifar(*RESNET56, id="resnet56-reference", cut="input", methods=FEW),
    )
}
SHORT_LIMIT = 100
SHORT_BOARDS = ("resnet20-device", "resnet20-reference")


def short() -> list[Board]:
    """A cut of ten minutes: 100 frames a corruption, one seed, and none of the methods that take minutes."""
    boards = [replace(BOARDS[name], limit=SHORT_LIMIT, seeds=(0,)) for name in SHORT_BOARDS]
    return [
        replace(board, methods=tuple(name for name, _ in board.cells() if name not in MANY_VIEWS))
        if board.is_reference
        else board
        for board in boards
    ]


def selected(ids: Sequence[str]) -> list[Board]:
    """Boards by their ids; all of them for none. Raises: ConfigError with the nearest id."""
    for name in ids:
        if name not in BOARDS:
            raise ConfigError(f"there is no board {name!r}", remedy=did_you_mean(name, BOARDS))
    return [BOARDS[name] for name in ids] or list(BOARDS.values())


def sweep(
    boards: Sequence[Board],
    *,
    data_root: Path,
    out: Path,
    work: Path,
    jobs: int = 1,
    again: Sequence[str] = (),
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Make every cell that is not there yet, and keep it in `<out>/<board>.json` at once.

    Args:
        data_root: folder with the images and weights that the boards name.
        work: where bundles are exported to, and found again.
        jobs: cells at a time. More than one disturbs the times, though ratios less so.
        again: methods whose cells are made anew.
    Raises: DataError if the data is not there. A method that a bundle cannot serve is a cell that says why.
    """
    if not data_root.is_dir():
        raise DataError(f"{data_root} is no folder", remedy="give the folder that holds the images and models")
    out.mkdir(parents=True, exist_ok=True)
    for board in boards:
        cells = [cell for cell in read_cells(out, board.id) if cell["method"] not in again]
        done = {(cell["method"], cell["seed"]) for cell in cells if cell["limit"] == board.limit}
        open_cells = [cell for cell in board.cells() if cell not in done]
        progress(board.id, len(done), len(done) + len(open_cells))
        if not open_cells:
            continue
        bundle = _exported(board, data_root, work)
        stream = _stream(board, data_root, work)
        for number, cell in enumerate(_made(board, bundle, stream, open_cells, jobs), 1):
            cells.append(cell)
            _write(out, board, cells)
            progress(board.id, len(done) + number, len(done) + len(open_cells))


def read_cells(out: Path, board: str) -> list[Cell]:
    """The cells of a board that were made so far. Raises: ArtifactError if the file is damaged."""
    path = out / f"{board}.json"
    if not path.exists():
        return []
    try:
        read = json.loads(path.read_bytes())
        cells: list[Cell] = read["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", remedy="remove it; its cells are made anew") from error
    return cells


def _write(out: Path, board: Board, cells: list[Cell]) -> None:
    order = {cell: place for place, cell in enumerate(board.cells())}
    cells.sort(key=lambda cell: order.get((cell["method"], cell["seed"]), len(order)))
    text = json.dumps({"schema": SCHEMA, "board": asdict(board), "cells": cells}, indent=1)
    write_atomically(out / f"{board.id}.json", text.encode())


def _exported(board: Board, data_root: Path, work: Path) -> Path:
    """The board's bundle, exported if it is not there yet. In a process of its own, for the sake of memory."""
    folder = work / (f"{board.model.removeprefix('zoo:')}-{board.cut or 'device'}" + "-warm" * board.warm_up)
    if not (folder / "manifest.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(_export, (board, data_root, folder))
    return folder


def _stream(board: Board, data_root: Path, work: Path) -> Path:
    """The board's data, with its corruptions made once and kept where it does not hold them."""
    source = data_root / board.data
    made = work / f"{source.stem}-{board.severity}-{board.limit}.npz"
    if source.suffix == ".npz" or made.exists():
        return source if source.suffix == ".npz" else made
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(_corrupt, (board, source, made))
    return made


def _corrupt(board: Board, source: Path, made: Path) -> None:
    from benchmarks.scenarios import corrupted
    from edge_adapt.streams.corruptions import CORRUPTIONS
    from edge_adapt.streams.data import load_data

    data = load_data(source)
    # A folder is read in the order of its classes: draw, or half of them would never come and the others in runs.
    data = data[np.random.default_rng(0).permutation(len(data))[: board.limit]]
    arrays: dict[str, Any] = {"labels": data.labels}
    arrays |= {shift.name: shift.images for shift in corrupted(data, board.severity, 0, CORRUPTIONS)}
    aside = made.with_suffix(".tmp.npz")
    np.savez(aside, **arrays)
    aside.replace(made)


def _export(board: Board, data_root: Path, folder: Path) -> None:
    from exporters.cli import export

    export(
        model=board.model,
        out=folder,
        weights=None if board.weights is None else data_root / board.weights,
        cut=board.cut,
        calibration=str(data_root / board.calibration),
        warm_up=str(data_root / board.calibration) if board.warm_up else None,
    )


def _made(board: Board, bundle: Path, data: Path, cells: Sequence[tuple[str, int]], jobs: int) -> Iterator[Cell]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        yield from pool.imap(_cell, [(board, bundle, data, method, seed) for method, seed in cells])


def _cell(task: tuple[Board, Path, Path, str, int]) -> Cell:
    """One method beside plain inference, in this process."""
    from benchmarks.replay import Replay, replay
    from edge_adapt.bundle import Bundle
    from edge_adapt.streams.data import load_data
    from edge_adapt.threads import one_thread

    board, path, data, method, seed = task
    one_thread()
    bundle = Bundle.load(path)
    plan = Replay(
        methods=(BASELINE,) if method == BASELINE else (BASELINE, method),
        batch_size=board.batch_size,
        limit=board.limit,
        severity=board.severity,
        seed=seed,
    )
    cell: Cell = {"method": method, "seed": seed, "limit": board.limit}
    try:
        results = replay(bundle, load_data(data, bundle.manifest.classes), plan)
    except EdgeAdaptError as error:
        return cell | {"status": f"skipped: {error.what}"}
    return cell | {"status": "ok"} | _figures(results)


def _figures(results: dict[str, Any]) -> Cell:
    """What is kept of a replay; times are milliseconds a frame, `time` is a multiple of plain inference."""
    plain, row = results["rows"][0], results["rows"][-1]
    total = row["answer_ms"]["mean"] + row["learn_ms"]["mean"]
    return {
        "error": row["error_mean"],
        "errors": row["errors"],
        "time": round(total / plain["answer_ms"]["mean"], 3),
        "answer_ms": row["answer_ms"]["mean"],
        "learn_ms": row["learn_ms"]["mean"],
        "source_ms": plain["answer_ms"]["mean"],
        "passes": round(row["passes"] / row["frames"], 3),
        "looked": round(row["looked"] / row["frames"], 3),
        "extra_mb": row["extra_mb"],
        "events": dict(Counter(event["name"] for event in row["events"])),
        "bundle": results["bundle"]["id"],
        "environment": results["environment"],
    }
