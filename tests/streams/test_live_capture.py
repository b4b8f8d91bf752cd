"""Cameras and video files: a real video, and a camera that can be unplugged."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from edge_adapt.errors import ConfigError
from edge_adapt.streams.live import BrokenFrameError, SourceEnded, SourceLostError, capture, open_source
from edge_adapt.streams.live.capture import PATIENCE_MS, CameraSource, VideoSource


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Five frames of 32 x 48: red rising from 50 to 250."""
    cv2 = pytest.importorskip("cv2", reason="opencv is not installed")
    path = tmp_path_factory.mktemp("video") / "red.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (48, 32))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no MJPG")
    for red in range(50, 251, 50):
        writer.write(np.full((32, 48, 3), (10, 20, red), np.uint8))  # BGR
    writer.release()
    return path


def test_a_video_is_played_in_rgb_and_ends(video):
    source = VideoSource(video)
    source.open()
    frames = [source.read(0) for _ in range(5)]
    reds = [int(frame.image[..., 0].mean()) for frame in frames]
    assert frames[0].image.shape == (32, 48, 3) and frames[0].image.dtype == np.uint8
    assert np.abs(np.array(reds) - range(50, 251, 50)).max() < 12
    assert int(frames[0].image[..., 2].mean()) < 30
    assert [frame.number for frame in frames] == list(range(5)) and frames[1].name == "video red.avi/1"
    with pytest.raises(SourceEnded):
        source.read(0)
    source.close()
    source.close()


def test_a_video_plays_again_where_it_shall(video):
    source = open_source("video", path=video, loop=True, channels=1)
    source.open()
    frames = [frame for _ in range(14) if (frame := source.read(0)) is not None]
    assert [frame.number for frame in frames] == list(range(len(frames))) and len(frames) == 12
    assert frames[0].image.shape == (32, 48) and np.array_equal(frames[0].image, frames[5].image)
    source.close()


def test_a_video_without_a_readable_frame_is_lost_and_not_played_for_ever(tmp_path, video):
    with pytest.raises(SourceLostError, match="not there"):
        VideoSource(tmp_path / "none.avi").open()
    broken = tmp_path / "broken.avi"
    broken.write_bytes(b"RIFF" + b"\0" * 500)
    source = VideoSource(broken, loop=True)
    with pytest.raises(SourceLostError, match=r"cannot be opened|no readable frame"):
        source.open() or source.read(0)
    source.close()


def test_without_opencv_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match=r"edge-adapt\[video\]"):
        open_source("camera")


def coloured(image: np.ndarray, code: str) -> np.ndarray:
    if code == "COLOR_GRAY2RGB":
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return image[..., 0].copy() if code == "COLOR_BGR2GRAY" else image[..., ::-1].copy()


class Plug:
    """A camera in a socket: what `cv2.VideoCapture` sees of it."""

    def __init__(self) -> None:
        self.there, self.opened, self.released, self.calls = True, 0, 0, []
        self.images = [np.full((4, 6, 3), 7, np.uint8)]
        self.answers = threading.Event()  # its driver hangs while this is not set
        self.answers.set()

    def module(self) -> SimpleNamespace:
        names = ("CAP_PROP_BUFFERSIZE", "CAP_PROP_OPEN_TIMEOUT_MSEC", "CAP_PROP_READ_TIMEOUT_MSEC", "CAP_FFMPEG")
        colours = ("COLOR_BGR2RGB", "COLOR_BGR2GRAY", "COLOR_GRAY2RGB")
        return SimpleNamespace(
            VideoCapture=self.capture,
            error=RuntimeError,
            setNumThreads=lambda count: None,
            cvtColor=coloured,
            **{name: name for name in (*names, *colours)},
        )

    def capture(self, *arguments: object) -> SimpleNamespace:
        self.calls.append(arguments)
        self.opened += self.there
        opened = self.there

        def release() -> None:
            self.released += opened

        def read() -> tuple[bool, object]:
            self.answers.wait(20)
            if not self.there:
                return False, None
            return True, self.images[0] if len(self.images) == 1 else self.images.pop(0)

        return SimpleNamespace(isOpened=lambda: opened, read=read, release=release, set=lambda *facts: True)


@pytest.fixture
def plug(monkeypatch):
    made = Plug()
    monkeypatch.setitem(sys.modules, "cv2", made.module())
    return made


def test_a_camera_is_lost_when_unplugged_and_goes_on_when_plugged_in(plug):
    source = CameraSource("0")
    source.open()
    assert source.read(5).number == 0 and plug.calls == [(0,)]
    plug.there = False
    with pytest.raises(SourceLostError, match="camera 0 gives no frames"):
        source.read(5)
    with pytest.raises(SourceLostError, match="camera 0 cannot be opened"):
        source.open()
    with pytest.raises(SourceLostError, match="not open"):
        source.read(5)
    plug.there = True
    source.open()
    assert source.read(5).number == 1
    source.close()
    assert plug.opened == plug.released == 2  # no handle is left behind


def test_a_driver_that_hangs_holds_nobody_up_and_leaves_one_thread_behind(plug, monkeypatch):
    monkeypatch.setattr(capture, "PATIENCE_MS", 100)
    monkeypatch.setattr(capture, "CLOSING_S", 0.05)
    threads = threading.active_count()
    source = CameraSource(0)
    source.open()
    assert source.read(5).number == 0
    plug.answers.clear()
    assert source.read(0.01) is None  # late, not lost
    with pytest.raises(SourceLostError, match="camera 0 gives no frames"):
        source.read(0.2)
    source.close()
    for _ in range(3):
        with pytest.raises(SourceLostError, match="hangs in its driver"):
            source.open()
    assert threading.active_count() == threads + 1 and plug.opened == 1
    plug.answers.set()
    deadline = time.monotonic() + 10
    while plug.released == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    source.open()
    assert source.read(5).number == 2  # the frame of the old thread came too late
    source.close()
    assert plug.opened == plug.released == 2 and threading.active_count() == threads


def test_frames_without_pixels_are_broken_and_a_driver_that_raises_is_lost(plug):
    source = CameraSource("/dev/video0")
    source.open()
    plug.images = [None, np.zeros((0, 0, 3), np.uint8), np.zeros((4, 6), np.uint8), np.zeros((4, 6, 3), np.uint8)]
    for _ in range(2):
        with pytest.raises(BrokenFrameError, match="no pixels"):
            source.read(5)
    assert source.read(5).image.shape == (4, 6, 3)  # a grey camera for a network that takes colours

    def fail() -> None:
        raise RuntimeError("select timeout")

    source._device.read = fail
    with pytest.raises(SourceLostError, match="select timeout"):
        source.read(5)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://user:secret@10.0.0.7/live?x=1", "rtsp://10.0.0.7/..."),
        ("rtsp://10.0.0.7:554/user=a&password=secret", "rtsp://10.0.0.7:554/..."),
        ("rtsp://user:se/cret@10.0.0.7/live", "rtsp:///..."),
        ("rtsp://user:s@secret@10.0.0.7/", "rtsp://10.0.0.7/..."),
    ],
)
def test_a_network_stream_has_time_limits_and_its_password_is_not_shown(plug, address, shown):
    source = CameraSource(address)
    source.open()
    limits = ["CAP_PROP_OPEN_TIMEOUT_MSEC", PATIENCE_MS, "CAP_PROP_READ_TIMEOUT_MSEC", PATIENCE_MS]
    assert plug.calls == [(address, "CAP_FFMPEG", limits)]
    plug.there = False
    with pytest.raises(SourceLostError) as caught:
        source.read(5)
    assert caught.value.what == f"camera {shown} gives no frames"
