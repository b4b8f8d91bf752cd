"""What a piece of work costs the processor, whatever else the test process holds and does."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Spent:
    cpu_s: float = float("nan")
    """Processor seconds, once the work is done."""


@contextmanager
def spending() -> Iterator[Spent]:
    """Measure the work inside, of this thread alone; it does not pay for garbage that other tests left."""
    spent = Spent()
    gc.disable()
    began = time.thread_time()
    try:
        yield spent
    finally:
        spent.cpu_s = time.thread_time() - began
        gc.enable()
