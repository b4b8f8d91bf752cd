"""Recordings: what was recorded comes back bit for bit, what was cut off is left out, and the cap holds."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edge_adapt.errors import DataError, StateError
from edge_adapt.streams.data import load_data
from edge_adapt.streams.live.protocol import Frame
from edge_adapt.streams.recording import MB, SEGMENTS, Batch, Note, Recorder, load_recording, read_recording

SIDE = 16


@dataclass(frozen=True)
class Decided:
    """As the live loop's reply."""

    logits: np.ndarray
    version: int
    done: int
    looked: int
    posted: tuple[bool, ...]


def frames_of(first: int, count: int, kind: str = "uint8", side: int = SIDE) -> list[Frame]:
    rng = np.random.default_rng(first)
    images = rng.integers(0, 256, (count, side, side, 3)).astype(kind)
    return [Frame(first + at, float(at), image, f"täp/{first + at}") for at, image in enumerate(images)]


def decided(number: int) -> Decided:
    return Decided(np.zeros((1, 5), np.float32), number, number // 2, number % 3, (True, False))


def record(folder: Path, batches: int, max_mb: float = 10, size: int = 2) -> list[list[Frame]]:
    recorder = Recorder(folder, max_mb, facts={"boot": "abc"})
    given = [frames_of(number * size, size) for number in range(batches)]
    for number, frames in enumerate(given):
        recorder.answered(frames, decided(number))
    recorder.close()
    return given


def batches_in(folder: Path) -> list[Batch]:
    return [event for event in read_recording(folder) if isinstance(event, Batch)]


def assert_same(found: Batch, frames: list[Frame]) -> None:
    assert found.numbers == tuple(frame.number for frame in frames)
    assert found.names == tuple(frame.name for frame in frames)
    for image, frame in zip(found.images, frames, strict=True):
        assert image.dtype == frame.image.dtype and np.array_equal(image, frame.image)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_what_was_recorded_comes_back_in_order(tmp_path):
    given = record(tmp_path, 5)
    events = list(read_recording(tmp_path))
    assert events[0] == Note("begin", {"schema": 1, "boot": "abc"})
    assert len(events) == 6
    for number, (found, frames) in enumerate(zip(events[1:], given, strict=True)):
        assert isinstance(found, Batch)
        assert_same(found, frames)
        again = Decided(np.zeros(0), **found.decided)
        assert (again.version, again.done, again.looked) == (number, number // 2, number % 3)
        assert again.posted == (True, False)


def test_frames_of_several_kinds_in_one_batch(tmp_path):
    frames = [frames_of(0, 1)[0], frames_of(1, 1, "float32", 8)[0], frames_of(2, 1, "uint16")[0]]
    frames.append(Frame(3, 0.0, np.zeros((4, 6), np.uint8).T, "turned"))
    recorder = Recorder(tmp_path, 1)
    recorder.answered(frames, decided(1))
    recorder.close()
    assert_same(batches_in(tmp_path)[0], frames)
    with pytest.raises(DataError, match="4 kinds"):
        load_recording(tmp_path)


def test_notes_keep_their_place(tmp_path):
    recorder = Recorder(tmp_path, 1)
    recorder.answered(frames_of(0, 1), decided(0))
    recorder.note("reset", by="page", after=1)
    recorder.answered(frames_of(1, 1), decided(1))
    recorder.close()
    kinds = [event.kind if isinstance(event, Note) else event.numbers for event in read_recording(tmp_path)]
    assert kinds == ["begin", (0,), "reset", (1,)]


def test_replay_can_use_the_frames(tmp_path):
    given = record(tmp_path / "kept", 4)
    data = load_data(tmp_path / "kept")
    assert data.images is not None and data.labels is None
    assert data.images.shape == (8, SIDE, SIDE, 3) and data.images.dtype == np.uint8
    assert np.array_equal(data.images[3], given[1][1].image)
    assert data.ordered and data.gaps == ()


def test_a_new_run_is_a_gap_and_the_folder_of_an_agent_will_do(tmp_path):
    for batches in (3, 2, 1):
        record(tmp_path / "state" / "recording", batches)
    data = load_data(tmp_path / "state")
    assert data.name == "recording"
    assert len(data) == 12
    assert data.gaps == (6, 10)


def test_the_oldest_go_when_the_cap_is_reached(tmp_path):
    cap_mb = 0.1
    recorder = Recorder(tmp_path, cap_mb)
    for number in range(200):
        recorder.answered(frames_of(2 * number, 2), decided(number))
        assert size_of(tmp_path) <= cap_mb * MB
    recorder.close()
    found = [batch.numbers[0] for batch in batches_in(tmp_path)]
    assert found == list(range(found[0], 400, 2))
    assert size_of(tmp_path) > cap_mb * MB * (1 - 2 / SEGMENTS)


def test_a_restart_goes_on_and_keeps_to_the_cap(tmp_path):
    for _ in range(6):
        record(tmp_path, 30, 0.1)
        assert size_of(tmp_path) <= 0.1 * MB
    events = list(read_recording(tmp_path))
    assert events[-1].numbers == (58, 59)
    assert any(isinstance(event, Note) and event.kind == "begin" for event in events)


def test_a_smaller_cap_drops_what_is_too_much(tmp_path):
    record(tmp_path, 60, 0.2)
    record(tmp_path, 1, 0.05)
    assert size_of(tmp_path) <= 0.05 * MB


@pytest.mark.parametrize("suffix", [".jsonl", ".frames"])
def test_whatever_was_cut_off_is_left_out(tmp_path, suffix):
    given = record(tmp_path / "whole", 3)
    whole = (tmp_path / "whole" / f"00000001{suffix}").read_bytes()
    seen = set()
    for size in range(0, len(whole), 7):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        for content in (whole[:size], whole[:size] + bytes(len(whole) - size)):
            (tmp_path / "cut" / f"00000001{suffix}").write_bytes(content)
            found = batches_in(tmp_path / "cut")
            seen.add(len(found))
            for batch, frames in zip(found, given, strict=False):
                assert_same(batch, frames)
    assert seen == {0, 1, 2}


def test_a_run_after_a_cut_is_read_too(tmp_path):
    record(tmp_path, 3)
    lines = tmp_path / "00000001.jsonl"
    lines.write_bytes(lines.read_bytes()[:-5])
    record(tmp_path, 2)
    assert [batch.numbers[0] for batch in batches_in(tmp_path)] == [0, 2, 0, 2]
    (tmp_path / "00000001.frames").unlink()
    assert [batch.numbers[0] for batch in batches_in(tmp_path)] == [0, 2]


def test_a_flipped_bit_ends_its_segment(tmp_path):
    record(tmp_path, 3)
    for name in ("00000001.frames", "00000001.jsonl"):
        good = (tmp_path / name).read_bytes()
        for at in np.random.default_rng(0).integers(0, len(good), 60):
            wrong = bytearray(good)
            wrong[at] ^= 4
            (tmp_path / name).write_bytes(wrong)
            assert len(batches_in(tmp_path)) < 3
        (tmp_path / name).write_bytes(good)
    assert len(batches_in(tmp_path)) == 3


def test_a_disk_that_refuses_costs_a_batch_and_no_more(tmp_path):
    recorder = Recorder(tmp_path, 1)
    recorder.answered(frames_of(0, 1), decided(0))
    lines = recorder._lines
    with Path("/dev/full").open("wb", buffering=0) as recorder._lines:
        with pytest.raises(StateError, match=r"No space left.*\n.*free some space"):
            recorder.answered(frames_of(1, 1), decided(1))
        lines.close()
    recorder.answered(frames_of(2, 1), decided(2))
    recorder.close()
    assert [batch.numbers for batch in batches_in(tmp_path)] == [(0,), (2,)]
    assert sum(recorder._sizes.values()) == size_of(tmp_path)


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError, match="cannot be written"):
        Recorder(tmp_path / "file" / "x", 1).answered(frames_of(0, 1), decided(0))


def test_a_frame_larger_than_the_recording_is_refused(tmp_path):
    recorder = Recorder(tmp_path, 0.01)
    with pytest.raises(DataError, match="raise record_mb"):
        recorder.answered(frames_of(0, 1, side=100), decided(0))
    with pytest.raises(DataError, match="dtype object"):
        recorder.answered([Frame(0, 0.0, np.array([None]), "x")], decided(0))
    recorder.answered(frames_of(0, 1), decided(0))
    recorder.close()
    assert len(batches_in(tmp_path)) == 1


def test_no_recording_is_told_of(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="holds no recording"):
            list(read_recording(folder))
    Recorder(tmp_path, 1).close()
    recorder = Recorder(tmp_path, 1)
    recorder.note("reset")
    recorder.close()
    with pytest.raises(DataError, match="no whole frame"):
        load_recording(tmp_path)


def test_a_newer_recording_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_adapt.streams.recording.SCHEMA", 2)
    record(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(DataError, match="newer version"):
        list(read_recording(tmp_path))
    assert json.loads((tmp_path / "00000001.jsonl").read_bytes().split(b"\n")[0][9:])["facts"]["schema"] == 2
