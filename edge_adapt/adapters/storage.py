"""Adapters as files: safetensors with what they are in the metadata, whole or with one bit for each number.

A file says its kind, the settings of the adapter as JSON, and which tail it belongs to. That is the tail's hash and
not the bundle's id, which would change with every adapter that is listed in the manifest.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from edge_adapt.adapters.bottleneck import Bottleneck
from edge_adapt.adapters.conv import ConvAdapter
from edge_adapt.adapters.lora import LoRA
from edge_adapt.adapters.one_bit import OneBit, pack, unpack, worth_packing
from edge_adapt.adapters.prompt import Prompt
from edge_adapt.adapters.protocol import PREFIX, Adapter, Values, places
from edge_adapt.adapters.ssf import SSF
from edge_adapt.adapters.vida import VidaPair
from edge_adapt.bundle import TAIL, Bundle
from edge_adapt.delta import write_atomically
from edge_adapt.errors import ArtifactError, ConfigError, StateError
from edge_adapt.tail import Tail

Array = NDArray[Any]

SCHEMA = "1"
KINDS: dict[str, type[Adapter]] = {kind.kind: kind for kind in (VidaPair, LoRA, Bottleneck, ConvAdapter, SSF, Prompt)}
LEVELS = "#levels"
"""Behind the name of a packed tensor: its mean and sigma."""
REMEDY = "copy the file again, or go on without it"


def save(path: Path, adapter: Adapter, values: Values, bundle: Bundle, *, bits: Literal[1, 32] = 32) -> None:
    """Write aside, synced, renamed.

    Args:
        bits: 32 writes float32; 1 packs every matrix, which loses all but the signs (see `one_bit`).
    """
    arrays = {name: value.detach().numpy() for name, value in values.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    tensors: dict[str, Array] = {}
    for name, array in arrays.items():
        if bits == 1 and worth_packing(array):
            packed = pack(array)
            shapes[name] = packed.shape
            tensors[name] = packed.signs
            tensors[f"{name}{LEVELS}"] = np.array([packed.mean, packed.sigma])
        else:
            tensors[name] = np.ascontiguousarray(array).reshape(array.shape)
    settings = {item.name: getattr(adapter, item.name) for item in fields(adapter) if item.name != "places"}
    facts = {
        "schema": SCHEMA,
        "kind": adapter.kind,
        "settings": json.dumps(settings, sort_keys=True),
        "packed": json.dumps(shapes, sort_keys=True),
        "tail": tail_id(bundle),
    }
    write_atomically(path, to_safetensors(tensors, metadata=facts))


def load(path: Path, tail: Tail) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """The adapter and its values.

    Raises: ArtifactError if the file is missing, damaged, or no adapter; StateError if it belongs to another tail.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"the adapter {path} cannot be read: {error}", remedy=REMEDY) from error
    if facts.get("schema") != SCHEMA or facts.get("kind") not in KINDS:
        raise ArtifactError(
            f"{path} is no adapter that this version reads: schema {facts.get('schema')!r}, kind {facts.get('kind')!r}",
            remedy=f"known are schema {SCHEMA!r} and {', '.join(KINDS)}",
        )
    if facts.get("tail") != tail_id(tail.bundle):
        raise StateError(
            f"the adapter {path} belongs to tail {facts.get('tail')!r}, not {tail_id(tail.bundle)!r}",
            remedy="load an adapter that was made on this bundle",
        )
    try:
        values = {name: torch.from_numpy(array.copy()) for name, array in _unpacked(facts, tensors).items()}
        adapter = _adapter(facts, values, tail)
        _check(adapter, values)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise ArtifactError(f"the adapter {path} does not fit its own description: {error}", remedy=REMEDY) from error
    return adapter, values


def tail_id(bundle: Bundle) -> str:
    """Short name of exactly this tail."""
    return bundle.manifest.files[TAIL][:16]


def _unpacked(facts: dict[str, str], tensors: dict[str, Array]) -> dict[str, Array]:
    shapes = json.loads(facts["packed"])
    found = {name: array for name, array in tensors.items() if not name.endswith(LEVELS)}
    for name, shape in shapes.items():
        mean, sigma = tensors[f"{name}{LEVELS}"]
        found[name] = unpack(OneBit(tuple(shape), mean, sigma, found[name]))
    return found


def _adapter(facts: dict[str, str], values: Values, tail: Tail) -> Adapter:
    kind, settings = KINDS[facts["kind"]], json.loads(facts["settings"])
    if kind is Prompt:
        return Prompt(**settings)
    names = {name.removeprefix(PREFIX).rpartition("/")[0] for name in values}
    return kind(places(tail, names=names), **settings)


def _check(adapter: Adapter, values: Values) -> None:
    """Raises: ValueError unless the values are finite, and those that `init` would make, in name, shape and type."""
    expected = {name: value.shape for name, value in adapter.init(torch.Generator()).items()}
    found = {name: value.shape for name, value in values.items()}
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(f"{odd[0]} has shape {found.get(odd[0])}, expected {expected.get(odd[0])}")
    for name, value in values.items():
        if value.dtype != torch.float32 or not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} is of type {value.dtype}, or not finite")
