"""One snapshot as bytes: a safetensors file whose header holds the facts, the method's state and a checksum of all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge_adapt.delta import Delta
from edge_adapt.errors import ArtifactError, StateError
from edge_adapt.methods.protocol import Method
from edge_adapt.runtime.state_io import Structure, pack, packages, unpack

Array = NDArray[Any]

SCHEMA = 1
KIND = "edge-adapt snapshot"
LARGEST = 256 << 20
"""Bytes; no snapshot is larger, and no larger file is read."""
DELTA = "delta/"
UNSIGNED = "0" * 64
CHECKSUM = re.compile(rb'"sha256":"([0-9a-f]{64})"')
OLDER = "use an older snapshot, or source"


@dataclass(frozen=True)
class Facts:
    """What is told of a snapshot."""

    version: int = 0
    """Of what was in force."""
    ts: int = 0
    """Wall clock in milliseconds; nothing is ordered by it."""
    method: str = ""
    """Which method the state belongs to; whoever loads it compares."""
    frames: int = 0
    """Answered so far."""
    note: str = ""


@dataclass(frozen=True)
class Snapshot:
    """A delta, how it came about, and what its method remembers."""

    slot: str
    """`A`, `B`, `adapter` or `source`."""
    generation: int
    """Rises with every snapshot of this device."""
    delta: Delta
    facts: Facts
    structure: Structure | None = None
    """Of the method's state; None where there is none, as with source and adapters from outside."""
    tensors: Mapping[str, Array] = field(default_factory=dict)
    sha256: str = ""
    """Of the file, for one that was read."""

    def state(self, method: Method[Any]) -> Any:
        """The method's state: every later step is what it would have been. Its delta is `delta`, if it was at saving.

        Raises: StateError if there is none, or if it is of another method.
        """
        if self.structure is None:
            raise StateError(f"snapshot {self.slot} holds no state of a method", remedy="start the method anew")
        init = method.init()
        shared = {"delta": self.delta, "init": init}
        state = unpack(self.structure, self.tensors, packages(method), shared)
        if type(state) is not type(init):
            raise _of_another_method(state, init)
        _check_alike(state, init)
        return state


def encode(
    bundle_id: str, generation: int, delta: Delta, facts: Facts, method: Method[Any] | None = None, state: Any = None
) -> bytes:
    """The file. Raises: StateError if something in the state cannot be kept, is NaN, or if all is too large."""
    tensors: dict[str, Array] = {f"{DELTA}{name}": value for name, value in delta.items()}
    about = {"generation": generation, **asdict(facts)}
    header = {
        "kind": KIND,
        "schema": str(SCHEMA),
        "bundle": bundle_id,
        "sha256": UNSIGNED,
        "facts": json.dumps(about),
        "state": "null",
    }
    if method is not None:
        structure, held = pack(state, {"delta": delta, "init": method.init()})
        header["state"] = json.dumps(structure, allow_nan=False)
        tensors |= held
    _check_finite(tensors, "to be saved")
    data = save(tensors, metadata=header)
    if len(data) > LARGEST:
        raise StateError(f"a snapshot of {len(data)} bytes is above {LARGEST}", remedy="let the method learn less")
    return _signed(data)


def decode(data: bytes, bundle_id: str, slot: str) -> Snapshot:
    """What `encode` wrote. Raises: ArtifactError if damaged, StateError if too new or of another bundle."""
    checksum = _checksum(data)
    if checksum is None or _signed(data) != data:
        raise ArtifactError(f"snapshot {slot} is damaged: the checksum does not fit", remedy=OLDER)
    try:
        header = _metadata(data)
        if header.get("kind") != KIND:
            raise ArtifactError(f"snapshot {slot} is no snapshot of edge-adapt", remedy=OLDER)
        if int(header["schema"]) > SCHEMA:
            raise StateError(
                f"snapshot {slot} has format {header['schema']}, this version reads up to {SCHEMA}",
                remedy="upgrade edge-adapt, or use source",
            )
        if header["bundle"] != bundle_id:
            raise StateError(
                f"snapshot {slot} belongs to bundle {header['bundle']!r}, not {bundle_id!r}",
                remedy="put that bundle back, or start from source",
            )
        tensors = load(data)
        about, structure = json.loads(header["facts"]), json.loads(header["state"])
        numbers = {name: int(about[name]) for name in ("version", "ts", "frames")}
        facts = Facts(**numbers, method=str(about["method"]), note=str(about["note"]))
        _check_finite(tensors, slot)
        delta = Delta({name[len(DELTA) :]: value for name, value in tensors.items() if name.startswith(DELTA)})
        held = {name: value for name, value in tensors.items() if not name.startswith(DELTA)}
        sha256 = checksum.group(1).decode()
        return Snapshot(slot, int(about["generation"]), delta, facts, structure, held, sha256)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"snapshot {slot} cannot be read: {error!r}", remedy=OLDER) from error


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    made: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
    return made


def _checksum(data: bytes) -> re.Match[bytes] | None:
    """Where the checksum stands in the header; None if there is no header that could hold it."""
    size = int.from_bytes(data[:8], "little")
    return CHECKSUM.search(data[8 : 8 + size]) if 8 + size <= len(data) else None


def _signed(data: bytes) -> bytes:
    """The same file with the sha256 of itself, counted with zeros in that place."""
    found = _checksum(data)
    assert found is not None
    start, end = 8 + found.start(1), 8 + found.end(1)
    blank = data[:start] + UNSIGNED.encode() + data[end:]
    return data[:start] + hashlib.sha256(blank).hexdigest().encode() + data[end:]


def _check_finite(tensors: Mapping[str, Array], slot: str) -> None:
    """Raises: StateError for NaN anywhere, and for infinity in a delta; a state may say `none yet` by infinity."""
    for name, value in tensors.items():
        if value.dtype.kind != "f":
            continue
        bad = ~np.isfinite(value) if name.startswith(DELTA) else np.isnan(value)
        if bad.any():
            raise StateError(
                f"snapshot {slot}: {name} holds NaN or infinite numbers", remedy="roll back to the last good one"
            )


def _check_alike(state: Any, init: Any) -> None:
    """Raises: StateError if a state is not made as the method makes its own; what begins as None may be anything."""
    if not is_dataclass(init) or isinstance(init, Delta):
        return
    if type(state) is not type(init):
        raise _of_another_method(state, init)
    for item in fields(init):
        _check_alike(getattr(state, item.name), getattr(init, item.name))


def _of_another_method(state: Any, init: Any) -> StateError:
    return StateError(
        f"the state holds {type(state).__name__} where this method has {type(init).__name__}",
        remedy="run the method that saved it, or start this one anew",
    )
