"""Fault rows about frames: what must not be learned from, and sources that break, go away, or end."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from edge_adapt.bundle import InputSpec
from edge_adapt.monitor.sensor import FROZEN_AFTER, SensorCheck
from edge_adapt.runtime.intake import Intake
from edge_adapt.runtime.ring import Ring
from edge_adapt.streams.live import Frame, FrameSource, SourceLostError, open_source

SPEC = InputSpec(shape=(3, 16, 16), scale=255.0, mean=(0.5,), std=(0.25,))


def frames(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


class Watched:
    """An intake at work, and what it told."""

    def __init__(self, source: FrameSource) -> None:
        self.told: list[tuple[str, str]] = []
        self.ring: Ring[Frame] = Ring(1000)
        self.intake = Intake(source, self.ring, tell=lambda *what: self.told.append(what), retry_s=(0.02, 0.1))
        self.intake.start()

    def until(self, true: Callable[[], bool], timeout_s: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < deadline, f"it did not happen; told: {self.told}"
            time.sleep(0.002)


@pytest.fixture
def watch():
    running: list[Watched] = []

    def start(source: FrameSource) -> Watched:
        running.append(Watched(source))
        return running[-1]

    yield start
    assert all(watched.intake.stop(5) for watched in running)


@pytest.mark.fault(17)
def test_no_bad_frame_passes_the_check_and_every_good_one_does():
    """Of a stream with one bad frame in three, exactly the good ones are let through to learning."""
    rng, check = np.random.default_rng(1), SensorCheck(SPEC)
    spoil: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "nan": lambda image: np.where(rng.random(image.shape) < 0.01, np.nan, image),
        "constant": lambda image: np.full_like(image, int(image[0, 0, 0])),
        "shape": lambda image: image[:-1],
        "dtype": lambda image: image.astype(np.float32) / 255,
    }
    for number, image in enumerate(frames(600)):
        if number % 3:
            assert check.reason(image) is None
            continue
        reason = rng.choice([*spoil])
        assert check.reason(spoil[reason](image)) == reason
    assert check.reason(np.where(frames(1)[0] > 250, np.inf, 1.0).astype(np.float32)) == "nan"


@pytest.mark.fault(19)
@pytest.mark.parametrize("kind", ["repeated", "black"])
def test_a_frozen_sensor_is_told_for_as_long_as_it_lasts(kind):
    """Of 10,000 repeated frames no more than the first few are let through, and the first new frame is again."""
    check, image = SensorCheck(SPEC), frames(1)[0]
    if kind == "black":
        image = np.zeros_like(image)
    passed = [number for number in range(10_000) if check.reason(image.copy()) is None]
    assert passed == ([] if kind == "black" else list(range(FROZEN_AFTER - 1)))
    assert check.reason(frames(2)[1]) is None


@pytest.mark.fault(19)
def test_a_night_with_noise_is_no_frozen_sensor():
    """A dark scene in which only the noise of the sensor moves is still a working sensor."""
    check, rng = SensorCheck(SPEC), np.random.default_rng(2)
    assert {check.reason(rng.integers(2, 7, (16, 16, 3)).astype(np.uint8)) for _ in range(500)} == {None}


def test_a_camera_that_is_unplugged_and_comes_back_goes_on(watch):
    """The loss is told at once, the thread stays alive through it, and frames go on without a restart."""

    class Camera:
        paced, plugged, number = True, threading.Event(), 0

        def open(self) -> None:
            if not self.plugged.is_set():
                raise SourceLostError("camera 0 cannot be opened", remedy="plug it in")

        def read(self, timeout_s: float) -> Frame:
            time.sleep(0.002)
            if not self.plugged.is_set():
                raise SourceLostError("camera 0 gives no frames", remedy="plug it in")
            self.number += 1
            return Frame(self.number - 1, time.monotonic(), frames(1)[0], "camera")

        def close(self) -> None: ...

    camera = Camera()
    camera.plugged.set()
    watched = watch(camera)
    for unplugged in (1, 2):
        before = watched.intake.frames
        watched.until(lambda before=before: watched.intake.frames > before + 3)
        camera.plugged.clear()
        watched.until(lambda: watched.intake.lost)
        beat = watched.intake.beat
        watched.until(lambda beat=beat: watched.intake.beat > beat)
        camera.plugged.set()
        watched.until(lambda: not watched.intake.lost)
        assert watched.intake.losses == unplugged
    assert [what for what, _ in watched.told] == ["lost", "back"] * 2
    assert watched.told[0] == ("lost", "camera 0 gives no frames")


def test_a_video_that_ends_is_told_and_nothing_is_stuck(watch, tmp_path):
    """Every frame of the file is there, the end is told once, and the thread still shows life."""
    cv2 = pytest.importorskip("cv2", reason="opencv is not installed")
    writer = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (48, 32))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no MJPG")
    for value in range(0, 240, 20):
        writer.write(np.full((32, 48, 3), value, np.uint8))
    writer.release()
    watched = watch(open_source("video", path=tmp_path / "a.avi"))
    watched.until(lambda: watched.intake.ended)
    assert len(watched.ring) == 12 and watched.told == [("ended", "the source ended after 12 frames")]
    beat = watched.intake.beat
    watched.until(lambda: watched.intake.beat > beat)


def test_a_folder_with_a_broken_jpeg_loses_that_one_alone(watch, tmp_path):
    """The broken file is counted and told by name; all the others are answered, in order; repaired, it is too."""
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(40 * number))
    (tmp_path / "2.jpg").write_bytes(jpeg(80)[:-200])
    watched = watch(open_source("folder", path=tmp_path))
    watched.until(lambda: watched.intake.frames == 4)
    assert [frame.name for frame in watched.ring.take(9)] == ["0.jpg", "1.jpg", "3.jpg", "4.jpg"]
    ((what, text),) = watched.told
    assert what == "broken" and "2.jpg cannot be decoded" in text and watched.intake.broken == 1
    assert watched.intake.losses == 0
    (tmp_path / "2.jpg").write_bytes(jpeg(80))
    watched.until(lambda: watched.intake.frames == 5)
    assert watched.ring.take()[0].name == "2.jpg"
