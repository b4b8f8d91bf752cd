"""Weights of an optimised ONNX Runtime session, kept in buffers of ours: writing to them changes the next run.

ONNX Runtime stores a convolution's weights in blocks of 16 (AVX-512), 8 (AVX2) or 4 output channels. Which layout it
chose is not asked but found: the graph is optimised with tagged weights, and the blocks of each tag are compared with
every known layout. A layout that is not found is a reason to fall back, never a guess.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.merge import LiveUpdate

Array = NDArray[Any]

ALIGNMENT = 64
BLOCKS = (16, 8, 4, 32)


@dataclass(frozen=True)
class Layout:
    """How a weight [O, I, ...] lies in memory: as it is (block 0), or in blocks of output (and input) channels."""

    block: int = 0
    inputs_too: bool = False
    shape: tuple[int, ...] = ()
    """Shape that ONNX Runtime gives the stored tensor."""

    def store(self, plain: Array) -> Array:
        """Weight in the layout of full.onnx -> as stored."""
        if not self.block:
            return plain.reshape(self.shape)
        if plain.ndim == 1:
            return _padded(plain, 0, self.block)
        made = _padded(plain, 0, self.block)
        made = made.reshape(made.shape[0] // self.block, self.block, *made.shape[1:])
        if self.inputs_too:
            made = _padded(made, 2, self.block)
            made = made.reshape(*made.shape[:2], made.shape[2] // self.block, self.block, *made.shape[3:])
            made = np.moveaxis(made, (1, 3), (-1, -2))
        else:
            made = np.moveaxis(made, 1, -1)
        return made.reshape(self.shape)

    def channel_shape(self, stored: tuple[int, ...]) -> tuple[int, int, int]:
        """[blocks, values a channel, channels of a block]: how to see a stored weight, to scale its channels."""
        if not self.block:
            return stored[0], int(np.prod(stored[1:])), 1
        blocks = stored[0] // self.block
        return blocks, int(np.prod(stored)) // (blocks * self.block), self.block


def find_layout(plain: Array, stored: Array) -> Layout | None:
    """The layout that turns `plain` into `stored`, or None."""
    for layout in _candidates(plain, stored.shape):
        made = layout.store(plain)
        if made.shape == stored.shape and np.array_equal(made, stored):
            return layout
    return None


def _candidates(plain: Array, shape: tuple[int, ...]) -> Iterator[Layout]:
    if plain.size == int(np.prod(shape)):
        yield Layout(0, False, shape)
    for block in BLOCKS:
        rows = -(-plain.shape[0] // block) * block
        if shape[0] != rows:
            continue
        inner = int(np.prod(plain.shape[1:]))
        if rows * inner == int(np.prod(shape)):
            yield Layout(block, False, shape)
        if plain.ndim > 2:
            columns = -(-plain.shape[1] // block) * block
            if rows * columns * int(np.prod(plain.shape[2:])) == int(np.prod(shape)):
                yield Layout(block, True, shape)


def _padded(array: Array, axis: int, block: int) -> Array:
    missing = -array.shape[axis] % block
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return np.pad(array, widths)


@dataclass(frozen=True)
class LiveTensor:
    """One weight or bias of a layer, in one layout."""

    name: str
    layer: str
    role: str
    layout: Layout
    plain: Array
    """As in full.onnx."""
    site: slice | None
    """Its channels in a port vector."""


class Group:
    """Tensors side by side, so that one multiplication folds them all. Their source values, shared by all banks."""

    def __init__(self, tensors: list[LiveTensor]) -> None:
        self.tensors = tensors
        stored = [tensor.layout.store(tensor.plain) for tensor in tensors]
        self.shapes = [array.shape for array in stored]
        shapes = [tensor.layout.channel_shape(shape) for tensor, shape in zip(tensors, self.shapes, strict=True)]
        self.rows = [shape[0] for shape in shapes]
        base = aligned((sum(self.rows), *shapes[0][1:]))
        np.concatenate([array.reshape(shape) for array, shape in zip(stored, shapes, strict=True)], out=base)
        self.base = base
        self.index: NDArray[np.int64] | None = None
        if all(tensor.role == "weight" and tensor.site is not None for tensor in tensors):
            index = np.concatenate([_channel_index(tensor) for tensor in tensors])
            self.index = index.reshape(-1, 1, base.shape[2])


class Bank:
    """One copy of all live tensors, in memory that sessions read. Two banks make a change of weights a swap."""

    def __init__(self) -> None:
        self._groups: list[tuple[Group, Array]] = []
        self._places: list[tuple[LiveTensor, Array]] = []
        self._written: LiveUpdate | None = None
        self._replaced: set[str] = set()

    def add(self, group: Group) -> dict[tuple[str, Layout], Array]:
        """Memory for one more group, by tensor and layout; it stays where it is."""
        memory = aligned(group.base.shape)
        memory[...] = group.base
        made, start = {}, 0
        for tensor, shape, rows in zip(group.tensors, group.shapes, group.rows, strict=True):
            place = memory[start : start + rows].reshape(shape)
            self._places.append((tensor, place))
            made[tensor.name, tensor.layout] = place
            start += rows
        self._groups.append((group, memory))
        if self._written is not None:
            self.write(self._written)
        return made

    def write(self, update: LiveUpdate) -> None:
        """Fold an update into the memory. The caller sees to it that no session reads it meanwhile."""
        # The last factor, 1, belongs to the channels that only fill a block.
        factors = np.append(update.scale, np.float32(1))
        for group, folded in self._groups:
            if group.index is not None:
                _multiply(group.base, factors[group.index], folded)
        for tensor, memory in self._places:
            if tensor.role == "bias":
                memory[: tensor.plain.size] = self._bias(tensor, update)
            elif tensor.layer in update.weights:
                self._replace(tensor, memory, update)
            elif tensor.site is None and tensor.layer in self._replaced:
                memory[...] = tensor.layout.store(tensor.plain)
        self._replaced = set(update.weights)
        self._written = update

    @staticmethod
    def _bias(tensor: LiveTensor, update: LiveUpdate) -> Array:
        if tensor.site is not None:
            return update.bias[tensor.site]
        return update.biases.get(tensor.layer, tensor.plain)

    @staticmethod
    def _replace(tensor: LiveTensor, memory: Array, update: LiveUpdate) -> None:
        """A weight that is new as a whole, not only scaled."""
        plain = update.weights[tensor.layer]
        if tensor.site is not None:
            plain = plain * update.scale[tensor.site].reshape(-1, *(1,) * (plain.ndim - 1))
        memory[...] = tensor.layout.store(plain)


def grouped(tensors: list[LiveTensor]) -> list[Group]:
    """Weights of sites that have the same number of values a channel go together; everything else stays alone."""
    by_width: dict[tuple[int, int], list[LiveTensor]] = {}
    groups = []
    for tensor in tensors:
        if tensor.role == "weight" and tensor.site is not None:
            shape = tensor.layout.store(tensor.plain).shape
            by_width.setdefault(tensor.layout.channel_shape(shape)[1:], []).append(tensor)
        else:
            groups.append(Group([tensor]))
    return [*groups, *(Group(members) for members in by_width.values())]


def _multiply(base: Array, factors: Array, out: Array) -> None:
    """The same values either way; torch takes two thirds of NumPy's time, but is not imported for that."""
    torch = sys.modules.get("torch")
    if torch is None:
        np.multiply(base, factors, out=out)
    else:
        torch.mul(*map(torch.from_numpy, (base, factors)), out=torch.from_numpy(out))


def _channel_index(tensor: LiveTensor) -> NDArray[np.int64]:
    """For each stored output channel its place in a port vector; -1, the last, for those that fill a block."""
    assert tensor.site is not None
    index = np.arange(tensor.site.start, tensor.site.stop)
    return np.pad(index, (0, -len(index) % max(tensor.layout.block, 1)), constant_values=-1)


def aligned(shape: tuple[int, ...]) -> Array:
    """Zeroed float32 memory that starts at a cache line."""
    size = int(np.prod(shape)) * 4
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(np.float32).reshape(shape)
