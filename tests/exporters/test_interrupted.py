"""What machines and users do in the middle of a command: a full disk, Ctrl-C. Nothing half-made is left behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import INTERRUPTED, WRONG, assert_clear, copy_of
from safetensors.torch import load_file

from edge_adapt.bundle import FULL, MANIFEST, SOURCE, TAIL, TRUNK
from edge_adapt.cli import run

COMMAND = [sys.executable, "-W", "ignore", "-c", "from edge_adapt.cli import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("file", [FULL, TRUNK, TAIL, SOURCE, MANIFEST])
def test_a_full_disk_leaves_no_bundle(file, refused, factories, tmp_path, monkeypatch):
    """Each file in turn is the one that no longer fits."""
    full = OSError(28, "No space left on device")
    write, save, write_manifest = Path.write_bytes, torch.export.save, "exporters.writing.write_atomically"

    def write_bytes(path: Path, data: bytes) -> int:
        if path.name == file:
            write(path, data[: len(data) // 2])
            raise full
        return write(path, data)

    def save_tail(program, path, **options) -> None:
        save(program, path, **options)
        raise full

    def fail(path: Path, data: bytes) -> None:
        raise full

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    if file == TAIL:
        monkeypatch.setattr(torch.export, "save", save_tail)
    if file == MANIFEST:
        monkeypatch.setattr(write_manifest, fail)
    shown = refused("export", f"{factories}:small", "--out", tmp_path / "out")
    assert "No space left on device" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_a_limit_on_file_size_leaves_no_bundle(tmp_path):
    """The real thing: the system refuses to write more, in whichever library that happens."""
    done = subprocess.run(
        [*COMMAND, "export", "zoo:mlperf-resnet8", "--out", str(tmp_path / "out")],
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200 << 10, 200 << 10)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == WRONG, done.stderr
    assert_clear(done.stderr)
    left = {path.name for path in tmp_path.iterdir()} - {"torchinductor_root", ".ses"}  # torch's own
    assert not [name for name in left if "out" in name or "onnx" in name]


def interrupt(arguments: list[object], when: str, *, timeout: float = 120) -> tuple[int, str]:
    """Start a command, press Ctrl-C as soon as it says `when`; its exit code and everything it printed."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A background job is started with SIGINT ignored, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509, no thread yet
    )
    watchdog = threading.Timer(timeout, process.kill)
    watchdog.start()
    shown = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            shown += line
            if when in line:
                process.send_signal(signal.SIGINT)
                when = "\0"
        return process.wait(), shown
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


@pytest.mark.parametrize("stage", ["exporting", "cut at"])
def test_ctrl_c_during_export_leaves_nothing(stage, tmp_path):
    code, shown = interrupt(["export", "zoo:mlperf-resnet8", "--out", tmp_path / "out"], stage)
    assert code == INTERRUPTED, shown
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_during_export_keeps_the_bundle_that_was_there(device_bundle, tmp_path):
    out = copy_of(device_bundle, tmp_path)
    code, shown = interrupt(["export", "zoo:mlperf-kws", "--out", out, "--force"], "cut at")
    assert code == INTERRUPTED, shown
    assert run(["check", str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_ctrl_c_during_replay_leaves_nothing(device_bundle, tiny_data, tmp_path):
    many = np.tile(tiny_data.images, (100, 1, 1, 1))
    np.savez(tmp_path / "data.npz", images=many, labels=np.tile(tiny_data.labels, 100))
    arguments = ["--data", tmp_path / "data.npz", "--scenario", "natural", "--method", "source,moments"]
    arguments += ["--batch-size", 1, "--out", tmp_path / "run", "--json", tmp_path / "results.json"]
    code, shown = interrupt(["replay", device_bundle.path, *arguments], "source: ")
    assert code == INTERRUPTED, shown
    assert "Traceback" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_weights_survive_a_refusal(device_bundle, tmp_path):
    """Reading a bundle never writes to it."""
    before = {path.name: path.read_bytes() for path in device_bundle.path.iterdir()}
    run(["check", str(device_bundle.path)])
    assert {path.name: path.read_bytes() for path in device_bundle.path.iterdir()} == before
    assert load_file(device_bundle.path / SOURCE)
