"""One process at a time, also of several commands."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock of a place, waiting for whoever has it. It ends with the process, whatever ends that.

    Args:
        path: what is to be made; the lock is a file beside it, and its folder is made.
    Raises: OSError if that cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
