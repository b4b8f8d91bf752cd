"""Where a training was when it stopped: one file beside the output, rewritten after every epoch, safe against kills."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edge_adapt.delta import write_atomically
from edge_adapt.errors import ArtifactError

SUFFIX = ".warm-up"
PARTS = ("value", "momentum", "average")


@dataclass
class TrainingState:
    """Everything that the next epoch starts from, by parameter name. Random numbers are drawn anew for each epoch."""

    value: dict[str, Tensor]
    momentum: dict[str, Tensor]
    """Of the optimiser."""
    average: dict[str, Tensor]
    """Of the weights over the last steps."""
    epochs: int = 0
    """Epochs that are done."""

    @classmethod
    def start(cls, values: Mapping[str, Tensor]) -> TrainingState:
        """Before the first epoch, at these values."""
        copies = [{name: value.detach().clone() for name, value in values.items()} for _ in range(2)]
        return cls(copies[0], {name: torch.zeros_like(value) for name, value in values.items()}, copies[1])

    def save(self, path: Path, settings: Mapping[str, object]) -> None:
        """Write aside, synced, renamed, with the settings of the run. Raises: ArtifactError."""
        tensors = {f"{part}/{name}": value for part in PARTS for name, value in getattr(self, part).items()}
        facts = {"epochs": str(self.epochs), "settings": _text(settings)}
        packed = {name: value.detach().contiguous() for name, value in tensors.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(packed, metadata=facts))
        except OSError as error:
            raise ArtifactError(
                f"the state of the warm-up cannot be written to {path}: {error.strerror}", remedy="free space"
            ) from error

    @classmethod
    def load(cls, path: Path, settings: Mapping[str, object]) -> TrainingState | str | None:
        """The saved state; None if there is none; why not, if it is of another run or damaged."""
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        except (OSError, SafetensorError) as error:
            return f"{path.name} cannot be read ({error})"
        other = _difference(json.loads(facts.get("settings", "{}")), json.loads(_text(settings)))
        if other:
            return f"{path.name} is of a run with another {other}"
        parts = {
            part: {name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(part)}
            for part in PARTS
        }
        if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
            return f"{path.name} holds numbers that are not finite"
        return cls(**parts, epochs=int(facts["epochs"]))


def place_of(out: Path) -> Path:
    """The file for an output folder: `bundles/cam` -> `bundles/.cam.warm-up`."""
    return out.with_name(f".{out.name}{SUFFIX}")


def _text(settings: Mapping[str, object]) -> str:
    return json.dumps(dict(settings), sort_keys=True)


def _difference(found: Mapping[str, object], expected: Mapping[str, object]) -> str:
    return ", ".join(sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)))
