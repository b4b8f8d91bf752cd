"""A warm process whose children save under strace: any system call of theirs can meet a kill or an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

CHILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
from edge_adapt.delta import Delta
from edge_adapt.errors import StateError
from edge_adapt.runtime.snapshot_file import Facts
from edge_adapt.runtime.snapshots import SnapshotStore

for line in sys.stdin:
    what, folder = line.split(None, 1)
    child = os.fork()
    if not child:
        store = SnapshotStore(Path(folder.strip()), "0123456789abcdef")
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            if what == "save":
                store.save(Delta({"tail/w": np.full(300, 3.0)}), Facts(version=3))
            else:
                store.commit()
        except StateError:
            os._exit(3)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Saver:
    """A warm process whose children save, or commit, under strace."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, what: str, folder: Path, injection: str) -> int:
        """Wait status of one child that met the injection."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what} {folder}\n")
        self._process.stdin.flush()
        child = int(self._process.stdout.readline())
        _wait(lambda: _status(child, "State").startswith("T"))
        tracer = subprocess.Popen(
            ["strace", "-qq", "-o", "/dev/null", "-e", f"inject={injection}", "-p", str(child)],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _wait(lambda: tracer.poll() is not None or _status(child, "TracerPid") != "0")
            refused = tracer.poll() is not None
            os.kill(child, signal.SIGCONT)
            status = int(self._process.stdout.readline())
            _, complaint = tracer.communicate(timeout=10)
        finally:
            if tracer.poll() is None:
                tracer.kill()
                tracer.communicate()
        if refused:
            pytest.skip(f"strace may not trace here: {complaint.strip()}")
        return status

    def close(self) -> None:
        self._process.communicate(timeout=20)


def _status(process: int, field: str) -> str:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return line.split(":", 1)[1].strip()
    return ""


def _wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.002)
