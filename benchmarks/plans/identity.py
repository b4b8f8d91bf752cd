"""What a result depends on, as short names: the bytes of data, and the code that makes figures of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

import edge_adapt
from edge_adapt.errors import DataError
from edge_adapt.plugins import ENGINES, METHODS, ROUTERS, SCENARIOS, SOURCES, WRAPPERS, names
from edge_adapt.streams.data import DIGITS
from edge_adapt.streams.recorded import RECORDED

LIBRARIES = ("torch", "numpy", "onnxruntime", "scipy", "pillow", "tensorrt")
OWN, HARNESS = Path(edge_adapt.__file__).parent, Path(__file__).parents[1]
CODE = {
    "corruptions": (OWN / "streams" / "corruptions",),
    "replay": (
        OWN,
        HARNESS / "scenarios",
        *(HARNESS / f"{name}.py" for name in ("replay", "score", "costs", "memory", "estimate", "late")),
        *(HARNESS / "plans" / f"{name}.py" for name in ("tasks", "images")),
    ),
    "export": (OWN, HARNESS.parent / "exporters"),
}


@cache
def code_of(what: str) -> str:
    """Digest of the source and the libraries that a kind of result is made by; those of plug-ins for a replay."""
    made = hashlib.sha256()
    roots = [*CODE[what], *(_foreign_parts() if what == "replay" else ())]
    for root in roots:
        for file in [root] if root.is_file() else sorted(root.rglob("*.py")):
            made.update(f"{file.name}\n".encode() + file.read_bytes())
    for name in LIBRARIES:
        made.update(f"{name} {_version(name)}\n".encode())
    return made.hexdigest()[:16]


def data_digest(source: str) -> str:
    """Digest of all bytes of a data set as `replay --data` names it.

    What a package brings as a source is known by its name alone. Raises: DataError if the data cannot be read.
    """
    if source == DIGITS:
        return f"digits of scikit-learn {_version('scikit-learn')}"
    kind, colon, place = source.partition(":")
    if colon and kind in names(SOURCES):
        return source
    known = bool(colon) and kind in RECORDED
    path = Path(place if known else source)
    try:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        made = hashlib.sha256((kind if known else "").encode())
        for file in files:
            made.update(f"{file.relative_to(path).as_posix()} {_file_digest(file)}\n".encode())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", remedy="check the path in the plan") from error
    return made.hexdigest()


def _file_digest(file: Path) -> str:
    made = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def _foreign_parts() -> Iterator[Path]:
    """Source of the packages of others that bring methods, engines, scenarios or the like."""
    groups = METHODS, WRAPPERS, ENGINES, ROUTERS, SCENARIOS, SOURCES
    packages = {point.module.partition(".")[0] for group in groups for point in entry_points(group=group)}
    for package in sorted(packages - {"edge_adapt", "benchmarks"}):
        spec = find_spec(package)
        yield from (Path(place) for place in _places(spec.submodule_search_locations, spec.origin)) if spec else ()


def _places(folders: Iterable[str] | None, file: str | None) -> list[str]:
    return list(folders) if folders is not None else [file] if file else []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
