"""Bundles that a plan has a recipe for: exported once, in a process of its own, and found again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.plans.identity import code_of, data_digest
from benchmarks.plans.locks import alone
from benchmarks.plans.plan import ExportSpec
from benchmarks.plans.pool import fresh
from edge_adapt.bundle import MANIFEST
from edge_adapt.errors import ArtifactError, EdgeAdaptError


def exported(recipe: ExportSpec, folder: Path, tell: Callable[[str], None]) -> Path:
    """The bundle of a recipe, in a folder named by what it is made of.

    Raises: DataError if its files cannot be read, ArtifactError if it cannot be exported.
    """
    files = {
        part: None if (source := getattr(recipe, part)) is None else data_digest(source)
        for part in ("weights", "calibration", "warm_up", "head")
    }
    facts = {**recipe.model_dump(), **files, "code": code_of("export")}
    if recipe.model.endswith(".onnx"):
        facts["model"] = data_digest(recipe.model)
    made = folder / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    with alone(made):
        if not (made / MANIFEST).exists():
            tell(f"exporting {recipe.model}")
            aside = made.with_name(f"{made.name}.making")
            for old in (aside, made):
                shutil.rmtree(old, ignore_errors=True)
            _in_own_process(recipe, aside)
            aside.rename(made)
    return made


def _in_own_process(recipe: ExportSpec, out: Path) -> None:
    """For the sake of memory."""
    context = fresh()
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_export, args=(recipe.model_dump_json(), str(out), theirs))
    process.start()
    theirs.close()
    try:
        why: str | None = answer.recv_bytes().decode() or None
    except EOFError:
        why = "its process ended before it was done"
    finally:
        answer.close()
        process.join()
        process.close()
    if why is not None:
        raise ArtifactError(
            f"{recipe.model} cannot be exported: {why}", remedy="try the recipe with `edge-adapt export`"
        )


def _export(text: str, out: str, answer: Connection) -> None:
    from exporters.cli import export

    recipe = ExportSpec.model_validate_json(text)
    try:
        export(
            model=recipe.model,
            out=Path(out),
            weights=None if recipe.weights is None else Path(recipe.weights),
            cut=recipe.cut,
            calibration=recipe.calibration,
            warm_up=recipe.warm_up,
            head=recipe.head,
            estimate=recipe.estimate,
        )
    except Exception as error:
        answer.send_bytes((error.what if isinstance(error, EdgeAdaptError) else str(error) or repr(error)).encode())
    else:
        answer.send_bytes(b"")
