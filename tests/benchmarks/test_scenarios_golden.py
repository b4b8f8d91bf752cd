"""A scenario is for ever: the first frames of each, pinned. New ids are added by running this file; none is changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import scenarios
from edge_adapt.streams.data import Dataset

GOLDEN = Path(__file__).with_name("scenarios_golden.json")
FIRST, SEED, SEVERITY = 64, 3, 3
FRAMES, CLASSES = 120, 10
DOMAINS = ("gaussian_noise", "fog", "contrast", "clean")
MADE_HERE = ("gradual", "clean_return", "recurring", "continual")
"""Scenarios that are pinned on images too, so that the corruption itself is; the first frames are of noise and fog,
which need no library but NumPy."""
NEEDS_IMAGES = ("gradual", "real")


def pictures(first: int, count: int = FRAMES) -> np.ndarray:
    """[count, 16, 16, 3] uint8 by arithmetic alone; no two are alike."""
    number = np.arange(first, first + count, dtype=np.int64)[:, None, None, None]
    row, column, channel = np.ogrid[:16, :16, :3]
    made = number * 37 + number // 7 * 11 + row * (number % 5 + 3) + column * 7 + channel * 50 + row * column * 2
    return (made % 256).astype(np.uint8)


def labels() -> np.ndarray:
    return np.arange(FRAMES, dtype=np.int64) * 7 % CLASSES


DATA = {
    "ready": Dataset(
        "ready", None, labels(), {name: pictures(1000 * place) for place, name in enumerate(DOMAINS)}, {}
    ),
    "images": Dataset("images", pictures(0), labels()),
    "recording": Dataset("recording", pictures(0), None, ordered=True, gaps=(20, 50)),
}


def cases() -> list[tuple[str, str]]:
    """(id, data) for all that is pinned."""
    ids = sorted(scenarios.SCENARIOS)
    ready = [(name, "ready") for name in ids if name not in NEEDS_IMAGES]
    return [*ready, *((name, "images") for name in MADE_HERE), ("real", "recording")]


def pinned(name: str, data: str) -> dict[str, Any]:
    """What is kept of one: every shift's name and length, and a hash of each of the first frames with all its facts."""
    shifts = list(scenarios.get(name).play(DATA[data], SEVERITY, SEED))
    first: list[str] = []
    for shift in shifts:
        for place in range(min(FIRST - len(first), len(shift.images))):
            facts = [
                shift.images[place : place + 1].tobytes(),
                str(None if shift.labels is None else int(shift.labels[place])).encode(),
                str(shift.name if shift.domains is None else str(shift.domains[place])).encode(),
                str(shift.counts is None or bool(shift.counts[place])).encode(),
            ]
            first.append(hashlib.sha256(b"|".join(facts)).hexdigest()[:12])
    return {"shifts": [f"{shift.name}: {len(shift.images)}" for shift in shifts[:40]], "first": first}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize(("name", "data"), cases())
def test_the_first_frames_of_a_scenario_never_change(golden, name, data):
    assert f"{name}/{data}" in golden, f"{name} is new: run python {Path(__file__).name} to add it"
    assert pinned(name, data) == golden[f"{name}/{data}"]


def test_no_pinned_scenario_has_gone(golden):
    assert golden.keys() == {f"{name}/{data}" for name, data in cases()}
    assert all(len(entry["first"]) == FIRST for entry in golden.values())


def test_contaminated_is_the_stronger_of_its_two_kinds(golden):
    assert golden["contaminated/ready"] == golden["contaminated_30/ready"] != golden["contaminated_10/ready"]


if __name__ == "__main__":
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    made = {f"{name}/{data}": pinned(name, data) for name, data in cases() if f"{name}/{data}" not in known}
    GOLDEN.write_text(json.dumps({**known, **made}, indent=1) + "\n")
