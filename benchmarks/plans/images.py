"""Corrupted images, made once: kept on disk by what they are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.plans.identity import code_of
from benchmarks.plans.locks import alone
from edge_adapt.delta import write_atomically
from edge_adapt.errors import ArtifactError
from edge_adapt.streams import corruptions

Array = NDArray[Any]
SMALLEST = 1 << 18
"""Bytes: fewer are made faster than they are read."""
DIGEST = hashlib.sha256().digest_size
_FOLDER: ContextVar[Path | None] = ContextVar("folder of corrupted images", default=None)


@contextmanager
def kept_in(folder: Path | None) -> Iterator[None]:
    """Within, `corrupt` keeps what it makes in a folder, and takes it from there; None: it does not."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def corrupt(images: Array, name: str, severity: int, *, seed: int, first_frame: int = 0) -> Array:
    """`edge_adapt.streams.corruptions.corrupt`, from disk where it was made before.

    A damaged file is made again. Raises: as that does, and ArtifactError if the folder cannot be written.
    """
    folder = _FOLDER.get()
    if folder is None or images.nbytes < SMALLEST:
        return corruptions.corrupt(images, name, severity, seed=seed, first_frame=first_frame)
    path = folder / f"{_key(images, name, severity, seed, first_frame)}.images"
    try:
        with alone(path):
            found = _read(path, images.shape)
            if found is None:
                found = corruptions.corrupt(images, name, severity, seed=seed, first_frame=first_frame)
                data = found.tobytes()
                write_atomically(path, hashlib.sha256(data).digest() + data)
    except OSError as error:
        raise ArtifactError(
            f"{folder} cannot keep corrupted images: {error.strerror}",
            remedy="free some space, or choose another --cache",
        ) from error
    return found


def _key(images: Array, name: str, severity: int, seed: int, first_frame: int) -> str:
    facts = (name, severity, seed, first_frame, images.shape, str(images.dtype), code_of("corruptions"))
    made = hashlib.sha256(json.dumps(facts).encode())
    made.update(np.ascontiguousarray(images).data)
    return made.hexdigest()


def _read(path: Path, shape: tuple[int, ...]) -> Array | None:
    """The images of a file; None if it is not there or is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    body = memoryview(data)[DIGEST:]
    if data[:DIGEST] != hashlib.sha256(body).digest() or len(body) != int(np.prod(shape)):
        return None
    return np.frombuffer(body, np.uint8).reshape(shape)
