"""Memory of this process, now and at its peak over a stretch of work, where the system tells it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """What has been needed above plain inference since it was made.

    Args:
        plain_inference: its own peak is what others are compared with.
    """

    def __init__(self, plain_inference: Callable[[], object]) -> None:
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR.write_text("5")  # resets the high-water mark
            plain_inference()
            self._start: float | None = _status("VmHWM")
            CLEAR.write_text("5")
        except (OSError, AttributeError, KeyError):
            self._start = None

    @property
    def extra_mb(self) -> float | None:
        """Megabytes; None where the system does not tell."""
        if self._start is None:
            return None
        return round(max(0.0, _status("VmHWM") - self._start) / 1024, 1)


def resident_mb() -> float | None:
    """Megabytes of this process in memory now; None where the system does not tell."""
    gc.collect()
    try:
        return round(_status("VmRSS") / 1024, 1)
    except (OSError, KeyError):
        return None


def _status(key: str) -> float:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1])
    raise KeyError(key)
