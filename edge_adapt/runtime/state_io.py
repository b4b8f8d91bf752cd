"""A method's state as a structure of JSON and named tensors, and back: every later step is bit-equal. No pickle.

What a state is made of is packed by value: frozen dataclasses, dicts, tuples, lists, arrays, tensors and plain numbers.
Each object is written once, in a table, so that what was one object is one object again: methods tell by identity
whether a delta changed, or whether a tensor is still that of the source.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.delta import Delta
from edge_adapt.errors import StateError

Array = NDArray[Any]
Structure = dict[str, Any]

SCHEMA = 1
PACKAGE = "edge_adapt"
PLAIN = (bool, int, str, type(None))
DTYPES = "biuf"
"""Kinds of numpy dtypes that safetensors keeps: bool, integers, floats."""
DEEPEST = 64
REMEDY = "start the method anew; its delta can still be used"


def pack(state: Any, shared: Mapping[str, Any] | None = None) -> tuple[Structure, dict[str, Array]]:
    """A state as something for JSON, and tensors by name.

    Args:
        state: what `Method.step` left; not modified.
        shared: values that whoever unpacks has too, by name, such as the delta in force and `method.init()`. An object
            of theirs that stands in the state is referred to, not written: it will be that very object again.
    Raises: StateError naming the place of something that is no value.
    """
    packing = _Packing(shared or {})
    root = packing.value(state, ("state",))
    return {"schema": SCHEMA, "objects": packing.objects, "root": root}, packing.tensors


def unpack(
    structure: Structure,
    tensors: Mapping[str, Array],
    allowed: Sequence[str] = (PACKAGE,),
    shared: Mapping[str, Any] | None = None,
) -> Any:
    """The state again.

    Args:
        allowed: packages that may bring dataclasses; only modules that were imported already are looked at.
        shared: as in `pack`, under the same names.
    Raises: StateError if the structure is damaged, newer, or names something that is not there.
    """
    if not isinstance(structure, dict) or structure.get("schema") != SCHEMA:
        found = structure.get("schema") if isinstance(structure, dict) else structure
        raise StateError(f"the state has schema {found!r}, this version reads {SCHEMA}", remedy="upgrade edge-adapt")
    unpacking = _Unpacking(tensors, tuple(allowed), shared or {})
    try:
        for node in structure["objects"]:
            unpacking.objects.append(unpacking.object(node))
        return unpacking.value(structure["root"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise StateError(f"the state is damaged: {type(error).__name__}: {error}", remedy=REMEDY) from error


def packages(method: Any) -> tuple[str, ...]:
    """What `allowed` should be for a method: this package, and those of the method and of all inside it."""
    found = {PACKAGE}
    while method is not None:
        found.add(type(method).__module__.partition(".")[0])
        method = getattr(method, "host", None)
    return tuple(sorted(found))


@dataclass(frozen=True)
class _Axes:
    """An array in memory order, and how its axes stand: sums depend on that order in the last bits."""

    dense: Any
    order: list[int]

    @classmethod
    def of(cls, array: Any, strides: Sequence[int]) -> _Axes:
        order = sorted(range(len(strides)), key=lambda axis: -abs(strides[axis]))
        return cls(array.transpose(order) if isinstance(array, np.ndarray) else array.permute(order), order)


class _Packing:
    """The table while it is filled; what an object refers to stands before it."""

    def __init__(self, shared: Mapping[str, Any]) -> None:
        self.objects: list[Structure] = []
        self.tensors: dict[str, Array] = {}
        self._known: dict[int, int] = {}
        self._shared: dict[int, list[Any]] = {}
        for name, value in shared.items():
            for path, item in _walk(value, [name]):
                self._shared.setdefault(id(item), path)

    def value(self, value: Any, path: tuple[Any, ...]) -> Any:
        """A plain value as it is, anything else as a reference."""
        if type(value) in PLAIN:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if len(path) > DEEPEST:
            raise StateError(f"{_where(path[:6])}... is nested deeper than {DEEPEST}", remedy="make the state flat")
        place = self._known.get(id(value))
        if place is None:
            node = self._node(value, path)
            place = self._known[id(value)] = len(self.objects)
            self.objects.append(node)
        return {"ref": place}

    def _node(self, value: Any, path: tuple[Any, ...]) -> Structure:
        if id(value) in self._shared:
            return {"is": "shared", "path": self._shared[id(value)]}
        if isinstance(value, Delta):
            return {"is": "delta", "of": {name: self.value(array, (*path, name)) for name, array in value.items()}}
        if isinstance(value, np.generic):
            return {"is": "scalar", "tensor": self._stored(np.asarray(value), path)}
        if type(value) is np.ndarray:
            axes = _Axes.of(value, value.strides)
            return {"is": "array", "tensor": self._stored(axes.dense, path), "axes": axes.order}
        if _is_tensor(value):
            axes = _Axes.of(value.detach(), value.stride())
            return {"is": "tensor", "tensor": self._stored(_as_numpy(axes.dense, path), path), "axes": axes.order}
        if type(value) in (tuple, list):
            items = [self.value(item, (*path, index)) for index, item in enumerate(value)]
            return {"is": type(value).__name__, "of": items}
        if type(value) is dict:
            pairs = [[self.value(key, (*path, "key")), self.value(item, (*path, key))] for key, item in value.items()]
            return {"is": "dict", "of": pairs}
        if is_dataclass(value) and not isinstance(value, type):
            held = {item.name: self.value(getattr(value, item.name), (*path, item.name)) for item in fields(value)}
            return {"is": "data", "class": f"{type(value).__module__}:{type(value).__qualname__}", "of": held}
        raise StateError(
            f"{_where(path)} is a {type(value).__module__}.{type(value).__qualname__}, which is not kept in snapshots",
            remedy="hold values in a state: frozen dataclasses, dicts, tuples, arrays, tensors, numbers",
        )

    def _stored(self, array: Array, path: tuple[Any, ...]) -> str:
        if array.dtype.kind not in DTYPES or array.dtype.byteorder == ">" or array.dtype.itemsize > 8:
            raise StateError(f"{_where(path)} has dtype {array.dtype}", remedy="hold bools, integers or floats")
        name = f"state/{len(self.tensors)}"
        self.tensors[name] = np.ascontiguousarray(array).reshape(array.shape)
        return name


class _Unpacking:
    """The table while it becomes objects again."""

    def __init__(self, tensors: Mapping[str, Array], allowed: tuple[str, ...], shared: Mapping[str, Any]) -> None:
        self.objects: list[Any] = []
        self._tensors, self._allowed, self._shared = tensors, allowed, shared
        self._makers: dict[str, Callable[[Structure], Any]] = {
            "shared": lambda node: _resolved(self._shared, node["path"]),
            "delta": lambda node: Delta({name: self.value(item) for name, item in node["of"].items()}),
            "scalar": lambda node: self._tensors[node["tensor"]][()],
            "array": self._array,
            "tensor": self._tensor,
            "tuple": lambda node: tuple(self.value(item) for item in node["of"]),
            "list": lambda node: [self.value(item) for item in node["of"]],
            "dict": lambda node: {self.value(key): self.value(item) for key, item in node["of"]},
            "data": self._data,
        }

    def value(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "float" in value:
            return float(value["float"])
        place = value["ref"]
        if not 0 <= place < len(self.objects):
            raise IndexError(f"object {place} stands behind what refers to it")
        return self.objects[place]

    def object(self, node: Structure) -> Any:
        return self._makers[node["is"]](node)

    def _array(self, node: Structure) -> Array:
        return np.array(self._tensors[node["tensor"]], order="C").transpose(np.argsort(node["axes"]))

    def _tensor(self, node: Structure) -> Any:
        import torch

        dense = torch.from_numpy(np.array(self._tensors[node["tensor"]], order="C"))
        return dense.permute(tuple(int(axis) for axis in np.argsort(node["axes"])))

    def _data(self, node: Structure) -> Any:
        kind = _class(node["class"], self._allowed)
        found = {name: self.value(item) for name, item in node["of"].items()}
        names = [item.name for item in fields(kind)]
        if sorted(found) != sorted(names):
            raise StateError(
                f"the state's {node['class']} has fields {', '.join(sorted(found))}, here it has {', '.join(names)}",
                remedy=f"it was saved by another version; {REMEDY}",
            )
        made = kind(**{item.name: found[item.name] for item in fields(kind) if item.init})
        for item in fields(kind):
            if not item.init:
                object.__setattr__(made, item.name, found[item.name])
        return made


def _class(name: str, allowed: tuple[str, ...]) -> Any:
    """A dataclass of a module that is imported and allowed. Raises: StateError if it is not there, or no dataclass."""
    module_name, _, qualified = name.partition(":")
    found: Any = sys.modules.get(module_name)
    if not any(module_name == package or module_name.startswith(f"{package}.") for package in allowed):
        raise StateError(f"the state names {name}, which is outside {', '.join(allowed)}", remedy=REMEDY)
    for part in qualified.split("."):
        found = vars(found).get(part) if found is not None else None
    if not (isinstance(found, type) and is_dataclass(found)) or found.__module__ != module_name:
        raise StateError(f"the state names {name}, which is no dataclass that is imported here", remedy=REMEDY)
    return found


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    """What an object is made of, with the step that leads there."""
    if isinstance(value, (Delta, dict)):
        yield from value.items()
    elif type(value) in (tuple, list):
        yield from enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((item.name, getattr(value, item.name)) for item in fields(value))


def _walk(value: Any, path: list[Any]) -> Iterator[tuple[list[Any], Any]]:
    """Every object inside a value that has an identity and can be found by a path of names and numbers."""
    if type(value) in PLAIN or type(value) is float:
        return
    yield path, value
    for step, child in _children(value):
        if type(step) in (str, int):
            yield from _walk(child, [*path, step])


def _resolved(shared: Mapping[str, Any], path: list[Any]) -> Any:
    name, *steps = path
    if name not in shared:
        raise StateError(f"the state was saved with {name!r} beside it, which is not given", remedy=REMEDY)
    found = shared[name]
    for step in steps:
        parts = dict(_children(found))
        if step not in parts:
            raise StateError(f"the state refers to {_where(path)}, which is not there", remedy=REMEDY)
        found = parts[step]
    return found


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _as_numpy(tensor: Any, path: tuple[Any, ...]) -> Array:
    try:
        made: Array = tensor.cpu().numpy()
    except TypeError as error:
        raise StateError(f"{_where(path)} has dtype {tensor.dtype}", remedy="hold bools, integers or floats") from error
    return made


def _where(path: Sequence[Any]) -> str:
    return ".".join(str(step) for step in path)
