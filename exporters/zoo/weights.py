"""Reading weights files into modules: strict, without running code from the file, all or nothing."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edge_adapt.errors import ArtifactError

SHOWN = 3  # keys of each kind in a mismatch message
COUNTER = "num_batches_tracked"  # BatchNorm's step counter: unused in eval mode, absent from many files

_PICKLED = {".pth", ".pt", ".th"}
# What torch.load and safetensors raise for damaged, foreign or forbidden files; most were seen by fuzzing.
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
)


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Copy the weights in a file into a module; on any error the module is left as it was.

    Every tensor must fit by name and shape, with two allowances: a "module." in front of all names (left by
    `nn.DataParallel`) is dropped, and BatchNorm's step counters may be absent. A checkpoint that holds its
    weights under "state_dict" is unwrapped.

    Args:
        module: takes the weights, modified in place; keeps its own dtype and device.
        path: `.safetensors`, or `.pth`, `.pt`, `.th` (read with `weights_only=True`, so no code in it runs).
    Raises: ArtifactError if the file is missing, unreadable, or holds the weights of another model.
    """
    path = Path(path)
    found = _read(path)
    wanted = module.state_dict()
    problems = _differences(wanted, found)
    if problems:
        raise ArtifactError(
            f"{path.name} does not fit {type(module).__name__}: {'; '.join(problems)} "
            f"(the model has {len(wanted)} tensors, the file {len(found)})",
            remedy="check that the model name and the weights file belong together",
        )
    counters = {name: value for name, value in wanted.items() if _is_counter(name)}
    module.load_state_dict(counters | found)


def find_in_package(package: str, file_name: str) -> Path | None:
    """Path of a file that an installed distribution carries, or None; the package itself is not imported."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        return None
    for entry in files:
        if entry.name == file_name:
            path = Path(str(entry.locate()))
            return path if path.is_file() else None
    return None


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, under the names that the model uses."""
    if not path.is_file():
        raise ArtifactError(f"{path} is not a file", remedy="check the path of the weights")
    if path.suffix != ".safetensors" and path.suffix not in _PICKLED:
        raise ArtifactError(
            f"weights file {path.name} has the unknown suffix {path.suffix!r}",
            remedy="give a .safetensors, .pth, .pt or .th file",
        )
    try:
        raw: object = (
            torch.load(path, map_location="cpu", weights_only=True)
            if path.suffix in _PICKLED
            else load_file(path)
        )
    except _UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(
            f"weights file {path.name} cannot be read: {reason}",
            remedy="fetch it again, or save the state dict as .safetensors; pickled models are refused",
        ) from error
    return _state_dict(raw, path)


def _state_dict(raw: object, path: Path) -> dict[str, Tensor]:
    """Unwrap "state_dict", check that names lead to tensors, drop a common "module." prefix."""
    if isinstance(raw, Mapping) and isinstance(raw.get("state_dict"), Mapping):
        raw = raw["state_dict"]
    if not isinstance(raw, Mapping) or not all(isinstance(v, Tensor) for v in raw.values()):
        raise ArtifactError(
            f"weights file {path.name} holds a {type(raw).__name__} that is not a state dict",
            remedy="save `model.state_dict()`, not the model or an optimiser",
        )
    tensors = {str(name): value for name, value in raw.items()}
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """One sentence for each kind of difference, with its count and the first few names; empty if none."""
    missing = [name for name in wanted if name not in found and not _is_counter(name)]
    unexpected = [name for name in found if name not in wanted]
    misfits = [
        f"{name} is {_kind(found[name])}, expected {_kind(want)}"
        for name, want in wanted.items()
        if name in found and _kind(found[name]) != _kind(want)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape or type", misfits))
    return [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds if names]


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == COUNTER


def _kind(tensor: Tensor) -> str:
    """Shape of a float tensor; other types are named too, because copying integers would round in silence."""
    shape = str(list(tensor.shape))
    return shape if tensor.is_floating_point() else f"{str(tensor.dtype).removeprefix('torch.')} {shape}"


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
