"""What is kept to start sooner is damaged or of another version: row 26 of the table, for compiled learning steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_adapt.engines import step

EXAMPLES = {"x": torch.zeros(64)}
RIGHT = np.arange(64, dtype=np.float32) + np.linspace(1, 2, 64, dtype=np.float32)


def function(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x + torch.linspace(1, 2, 64),)


@pytest.fixture(scope="module")
def graph() -> bytes:
    """The graph, exported once; that takes seconds."""
    pytest.importorskip("onnxscript", reason="steps are compiled with onnxscript")
    return step.export_step(function, EXAMPLES, ["y"])


@pytest.fixture
def exports(graph, monkeypatch) -> list[int]:
    """One entry for each time that something was compiled."""
    made: list[int] = []
    monkeypatch.setattr(step, "export_step", lambda *given: made.append(1) or graph)
    return made


def answer(cache: Path) -> np.ndarray:
    run = step.compiled(function, EXAMPLES, ["y"], key="a test", cache=cache)
    return run({"x": np.arange(64, dtype=np.float32)})["y"]


def kept_in(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def flipped(data: bytes, part: float) -> bytes:
    at = int(part * (len(data) - 1))
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "cut off": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "something else": lambda data: b"no graph",
    "without a checksum": lambda data: data[step.DIGEST :],
    **{f"a bit flipped at {part:.0%}": lambda data, part=part: flipped(data, part) for part in np.linspace(0, 1, 21)},
}


@pytest.mark.fault(26)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_step_is_compiled_again(exports, tmp_path, damage):
    """R1, R9: nothing of a damaged file is used, were it one bit of a weight; then it is good again."""
    np.testing.assert_array_equal(answer(tmp_path), RIGHT)
    path = kept_in(tmp_path)
    good = path.read_bytes()
    path.write_bytes(DAMAGE[damage](good))
    np.testing.assert_array_equal(answer(tmp_path), RIGHT)
    assert len(exports) == 2 and path.read_bytes() == good
    np.testing.assert_array_equal(answer(tmp_path), RIGHT)
    assert len(exports) == 2, "the good one is used"


@pytest.mark.fault(26)
@pytest.mark.parametrize("library", ["torch", "onnxruntime"])
def test_a_step_of_another_version_is_not_used(exports, tmp_path, monkeypatch, library):
    """R9: whoever updates PyTorch or ONNX Runtime gets a graph that these made."""
    answer(tmp_path)
    module = step.torch if library == "torch" else step.ort
    monkeypatch.setattr(module, "__version__", "99.0")
    np.testing.assert_array_equal(answer(tmp_path), RIGHT)
    assert len(exports) == 2 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.fault(26)
@pytest.mark.parametrize("where", ["a folder in its place", "a file where the cache should be"])
def test_a_cache_that_cannot_be_used_costs_time_only(exports, tmp_path, where):
    """R1: the step is compiled and runs."""
    cache = tmp_path / "cache"
    if where == "a folder in its place":
        answer(cache)
        path = kept_in(cache)
        path.unlink()
        (path / "inside").mkdir(parents=True)
    else:
        cache.write_bytes(b"")
    for _ in range(2):
        np.testing.assert_array_equal(answer(cache), RIGHT)
