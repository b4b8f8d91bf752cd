"""Archives played back, watched folders, images handed in, and decoding what anybody may have sent."""

from __future__ import annotations

import io
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from spent import spending

from edge_adapt.errors import ConfigError, DataError
from edge_adapt.streams.live import (
    BrokenFrameError,
    PushedSource,
    SourceEnded,
    SourceLostError,
    open_source,
)
from edge_adapt.streams.live.archive import ArchiveSource
from edge_adapt.streams.live.folder import FolderSource
from edge_adapt.streams.live.images import MAX_PIXELS, decode


def encoded(value: int, kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    """One image of (value, 10, 200), [6, 8, 3]."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 10, 200)).save(buffer, kind, quality=95)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


class Clock:
    """Moves when told to, and by every look at it as little as clocks do."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_images_come_out_in_the_channels_of_the_network(kind):
    image = decode(encoded(120, kind), "a")
    assert image.shape == (6, 8, 3) and image.dtype == np.uint8 and image.flags.writeable
    assert np.abs(image[0, 0].astype(int) - (120, 10, 200)).max() <= 4
    assert decode(encoded(120, kind), "a", channels=1).shape == (6, 8)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "cannot be decoded"),
        (b"GIF89a" + b"\0" * 50, "cannot be decoded"),
        (encoded(1, "JPEG", (64, 64))[:-80], "cannot be decoded"),
        (bomb(5000, 5000), "5000 x 5000 pixels"),
        (bomb(20_000, 20_000), "cannot be decoded|pixels"),
        (bomb(2**31 - 1, 2**31 - 1), "cannot be decoded|pixels"),
        (bomb(4000, 4000), "cannot be decoded"),  # within the limit, but its data ends early
        (b"\x89PNG" + b"\0" * (17 * 1024 * 1024), "at most"),
    ],
)
def test_what_is_damaged_or_too_large_is_a_broken_frame(data, told):
    with spending() as spent, pytest.raises(BrokenFrameError, match=told):
        decode(data, "a")
    assert spent.cpu_s < 2


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_images_give_pixels_or_a_broken_frame(data):
    whole = bytearray(encoded(7, data.draw(st.sampled_from(["PNG", "JPEG", "BMP"]))))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        image = decode(cut, "a")
    except BrokenFrameError:
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.size <= 3 * MAX_PIXELS


# --- archives ---------------------------------------------------------------------------------------------------------


def test_an_archive_is_played_in_order_and_ends(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(3))
    source = ArchiveSource(tmp_path / "a.npz")
    source.open()
    frames = [source.read(0) for _ in range(3)]
    assert [(frame.number, frame.name) for frame in frames] == [(0, "a/0"), (1, "a/1"), (2, "a/2")]
    assert all(np.array_equal(frame.image, image) for frame, image in zip(frames, images, strict=True))
    for _ in range(2):
        with pytest.raises(SourceEnded):
            source.read(0)


def test_an_archive_of_shifts_is_played_one_after_the_other_and_again(tmp_path):
    np.savez(tmp_path / "a.npz", fog=np.zeros((2, 4, 4), np.uint8), snow=np.ones((1, 4, 4), np.uint8), labels=[0, 1])
    with pytest.raises(DataError, match="labels"):  # as everywhere: one label for each frame
        ArchiveSource(tmp_path / "a.npz").open()
    np.savez(tmp_path / "a.npz", fog=np.zeros((2, 4, 4), np.uint8), snow=np.ones((1, 4, 4), np.uint8))
    source = ArchiveSource(tmp_path / "a.npz", loop=True)
    source.open()
    frames = [source.read(0) for _ in range(7)]
    assert [frame.name for frame in frames] == ["fog/0", "fog/1", "snow/0", "fog/0", "fog/1", "snow/0", "fog/0"]
    assert [frame.number for frame in frames] == list(range(7))
    frames[0].image[:] = 9  # whoever has a frame owns it
    assert source.read(0).image.max() == 0
    source.open()
    assert source.read(0).number == 8


def test_an_archive_that_is_missing_empty_or_no_archive_is_told(tmp_path):
    with pytest.raises(SourceLostError, match="not there"):
        ArchiveSource(tmp_path / "none.npz").open()
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="no readable"):
        ArchiveSource(tmp_path / "bad.npz").open()
    np.savez(tmp_path / "empty.npz", images=np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match="no frames"):
        ArchiveSource(tmp_path / "empty.npz", loop=True).open()


# --- folders ----------------------------------------------------------------------------------------------------------


def watching(path: Path, **facts) -> FolderSource:
    source = FolderSource(path, poll_s=0.01, **facts)
    source.open()
    return source


def names(source: FolderSource, most: int) -> list[str]:
    """Up to so many; patient with the first, which a busy machine may be slow to find."""
    found: list[str] = []
    while len(found) < most and (frame := source.read(0.1 if found else 5.0)) is not None:
        found.append(frame.name)
    return found


def test_a_folder_gives_what_is_there_in_name_order_then_what_appears(tmp_path):
    for name in ("b.png", "a.JPG", "c.txt", "d.bmp"):
        (tmp_path / name).write_bytes(encoded(5, {"a.JPG": "JPEG", "d.bmp": "BMP"}.get(name, "PNG")))
    (tmp_path / "e.png").mkdir()
    source = watching(tmp_path)
    assert names(source, 9) == ["a.JPG", "b.png", "d.bmp"]
    assert source.read(0.03) is None
    (tmp_path / "0.png").write_bytes(encoded(9))
    frame = source.read(1)
    assert frame.name == "0.png" and frame.number == 3 and frame.image[0, 0, 0] == 9


def test_a_file_counts_once_it_stopped_growing(tmp_path):
    clock = Clock()
    source = FolderSource(tmp_path, poll_s=1.0, clock=clock)
    source.open()
    whole, grown = encoded(5), tmp_path / "a.png"
    grown.touch()
    for end in (0, 20, 40, len(whole)):
        grown.write_bytes(whole[:end])
        assert source.read(0) is None  # one look each
        clock.now += 2
    assert source.read(0).name == "a.png"


def test_a_file_that_is_written_anew_is_a_new_frame(tmp_path):
    source = watching(tmp_path)
    for value in (1, 2, 3):
        (tmp_path / "latest.png").write_bytes(encoded(value))
        frame = source.read(1)
        assert frame.image[0, 0, 0] == value
        assert source.read(0.03) is None
        time.sleep(0.01)  # coarse file times


def test_what_is_deleted_is_forgotten(tmp_path):
    source = watching(tmp_path)
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    assert len(names(source, 20)) == 20
    for file in tmp_path.iterdir():
        file.unlink()
    assert source.read(0.03) is None
    assert not source._seen and not source._done  # memory is bounded by the folder


def test_a_folder_that_goes_is_lost_and_comes_back(tmp_path):
    folder = tmp_path / "frames"
    with pytest.raises(SourceLostError, match="not there"):
        FolderSource(folder).open()
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(1))
    source = watching(folder)
    assert names(source, 1) == ["a.png"]
    folder.rename(tmp_path / "away")
    with pytest.raises(SourceLostError, match="cannot be read"):
        source.read(0.1)
    (tmp_path / "away").rename(folder)
    source.open()
    assert source.read(0.05) is None  # not read twice
    (folder / "b.png").write_bytes(encoded(2))
    assert names(source, 1) == ["b.png"]


def test_a_large_folder_takes_a_bounded_share_of_the_time(tmp_path):
    clock = Clock()

    class Slow(FolderSource):
        looks = 0

        def _look(self) -> None:
            Slow.looks += 1
            clock.now += 0.5

    source = Slow(tmp_path, poll_s=0.1, clock=clock)
    source.open()
    for _ in range(300):
        source.read(0)
        clock.now += 0.1
    assert Slow.looks <= 5


# --- images handed in -------------------------------------------------------------------------------------------------


def test_pushed_images_are_read_in_order_and_the_newest_are_kept():
    source = PushedSource("cameras/7", waiting=2)
    source.open()
    assert source.read(0) is None
    for value in (1, 2, 3):
        source.push(encoded(value), f"n{value}")
    frames = [source.read(0), source.read(0)]
    assert [(frame.name, frame.image[0, 0, 0]) for frame in frames] == [("n2", 2), ("n3", 3)]
    assert source.read(0) is None and source.dropped == 1


def test_pushing_never_raises_and_what_is_wrong_is_told_by_reading():
    source = PushedSource("cameras/7", max_bytes=1000)
    source.open()
    for data in (b"", b"\0" * 1001, bomb(5000, 5000)):
        source.push(data)
    source.push(encoded(4))
    for told in ("cannot be decoded", "1001 bytes, at most 1000", "pixels"):
        with pytest.raises(BrokenFrameError, match=told):
            source.read(0)
    assert source.read(0).image[0, 0, 0] == 4


def test_a_reader_is_woken_by_a_push_and_let_go_by_close():
    source = PushedSource("x")
    source.open()
    got = []

    def reader() -> None:
        got.append(source.read(5))
        with pytest.raises(SourceEnded):
            source.read(5)

    thread = threading.Thread(target=reader)
    thread.start()
    source.push(encoded(1))
    deadline = time.monotonic() + 5
    while not got and time.monotonic() < deadline:
        time.sleep(0.001)
    source.close()
    thread.join(5)
    assert not thread.is_alive() and got[0].name == "x"


# --- the factory ------------------------------------------------------------------------------------------------------


def test_the_factory_makes_every_kind(tmp_path):
    pytest.importorskip("cv2", reason="opencv is not installed")
    for kind in ("archive", "folder", "video"):
        assert open_source(kind, path=tmp_path).paced is False
        with pytest.raises(ConfigError, match=f"kind {kind} needs `path`"):
            open_source(kind)
    assert open_source("camera", device=3).paced and open_source("mqtt", topic="a/b").paced
    with pytest.raises(ConfigError, match="needs `topic`"):
        open_source("mqtt")
    with pytest.raises(ConfigError, match="did you mean folder"):
        open_source("foldr")
