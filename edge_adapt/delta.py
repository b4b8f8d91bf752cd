"""A delta: everything that adaptation may change, as one value. Keep one and you have a snapshot."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edge_adapt.errors import ArtifactError, StateError

Array = NDArray[Any]

PORT_SCALE, PORT_SHIFT = "ports/scale", "ports/shift"
PROMPTS = "prompts"
TAIL = "tail/"


@dataclass(frozen=True, eq=False)
class Delta(Mapping[str, Array]):
    """Named tensors that differ from source. The empty delta is source itself.

    `ports/scale` and `ports/shift`: [channels of all sites], in the order of the manifest. A site answers
    `weight * (scale * x + shift) + bias`, where x is its normalised input; identity is 1 and 0.
    `prompts`: [P, width], tokens that a transformer takes behind its class token; identity is none.
    `tail/<parameter>`: a parameter of the tail, whole, in the shape that it has there.
    """

    tensors: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        frozen = {}
        for name, value in self.tensors.items():
            array = np.array(value, np.float32)  # a copy: a delta never changes under its reader
            array.flags.writeable = False
            frozen[name] = array
        object.__setattr__(self, "tensors", MappingProxyType(frozen))

    def __reduce__(self) -> tuple[type[Delta], tuple[dict[str, Array]]]:
        """For another process of ours; files and messages hold safetensors."""
        return type(self), (dict(self.tensors),)

    @classmethod
    def source(cls) -> Delta:
        """The identity: the model as exported."""
        return cls()

    @classmethod
    def of_ports(cls, scale: Array, shift: Array) -> Delta:
        """A delta of ports alone."""
        return cls({PORT_SCALE: scale, PORT_SHIFT: shift})

    def __getitem__(self, name: str) -> Array:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __or__(self, other: Mapping[str, Array]) -> Delta:
        """This delta with the other's tensors on top."""
        return Delta({**self.tensors, **other})

    @property
    def tail(self) -> dict[str, Array]:
        """Parameter name -> value, for the tail."""
        return {name[len(TAIL) :]: value for name, value in self.tensors.items() if name.startswith(TAIL)}

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        return sum(value.nbytes for value in self.tensors.values())

    def is_finite(self) -> bool:
        """False if any number is NaN or infinite."""
        return all(bool(np.isfinite(value).all()) for value in self.tensors.values())

    def same_as(self, other: Delta) -> bool:
        """Equal names and bit-equal values."""
        return self.keys() == other.keys() and all(np.array_equal(self[name], other[name]) for name in self)

    def save(self, path: Path, *, bundle_id: str) -> None:
        """Write as safetensors: aside, synced, renamed. `bundle_id` says which bundle it belongs to."""
        data = save(dict(self.tensors), metadata={"bundle": bundle_id, "schema": "1"})
        write_atomically(path, data)

    @classmethod
    def load(cls, path: Path, *, bundle_id: str) -> Delta:
        """Read a saved delta. Raises: ArtifactError if damaged, StateError if it belongs to another bundle."""
        try:
            with safe_open(path, framework="numpy") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"the delta {path} cannot be read: {error}", remedy="use an older snapshot, or source"
            ) from error
        if facts.get("bundle") != bundle_id:
            raise StateError(
                f"the delta {path} belongs to bundle {facts.get('bundle')!r}, not {bundle_id!r}",
                remedy="load a delta that was learned on this bundle",
            )
        return cls(tensors)


def write_atomically(path: Path, data: bytes) -> None:
    """Write aside, sync, rename, sync the folder: after a power cut the file is the old one or the new one."""
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
