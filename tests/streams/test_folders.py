"""Folders of images and videos as people keep them: what is read, in which order, at which size, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_adapt.bundle import InputSpec
from edge_adapt.errors import DataError
from edge_adapt.preprocess import Preprocess
from edge_adapt.streams import folders
from edge_adapt.streams.data import load_data

SMALL = InputSpec(shape=(3, 16, 16), scale=255.0)
LARGE = InputSpec(shape=(3, 20, 20), scale=255.0, resize=(24, 20))
CLASSES = ("cat", "traffic light", "dog")
WNIDS = ("n01440764", "n01484850", "n02342885")


def save(file: Path, value: int = 0, size: tuple[int, int] = (16, 16)) -> None:
    """One image, all of one grey."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(file)


@pytest.fixture
def pets(tmp_path) -> Path:
    """Two classes of ten; an image says its class: even values are cats."""
    for number in range(10):
        save(tmp_path / "pets" / "cat" / f"{number}.png", 2 * number)
        save(tmp_path / "pets" / "Traffic_Light" / f"{number}.png", 2 * number + 1)
    return tmp_path / "pets"


def values(data) -> list[int]:
    return data.images[:, 0, 0, 0].tolist()


def test_class_folders_are_numbered_by_the_model_and_mixed_the_same_way_each_time(pets):
    data, again = (load_data(pets, CLASSES, spec=SMALL) for _ in range(2))
    assert data.labels.tolist() == [value % 2 for value in values(data)]
    assert sorted(values(data)) == list(range(20))
    assert values(data) == values(again) != sorted(values(data))
    assert len(set(data.labels[:10].tolist())) == 2
    assert not data.ordered
    part = load_data(pets, CLASSES, spec=SMALL, limit=7)
    assert values(part) == values(data)[:7]
    assert part.labels.tolist() == data.labels[:7].tolist()


def test_hidden_files_are_no_images(pets):
    save(pets / ".thumbnails" / "1.png")
    (pets / "cat" / "._1.png").write_bytes(b"what macOS leaves behind")
    assert len(load_data(pets, CLASSES, spec=SMALL)) == 20


def test_a_model_without_class_names_numbers_folders_by_name_or_by_the_number_they_are(pets, tmp_path):
    data = load_data(pets, None, spec=SMALL)
    assert data.labels.tolist() == [1 - value % 2 for value in values(data)]  # Traffic_Light, then cat
    for number in (0, 2, 10):
        save(tmp_path / "numbered" / str(number) / "a.png", number)
    numbered = load_data(tmp_path / "numbered", None, spec=SMALL)
    assert numbered.labels.tolist() == values(numbered)


def test_a_folder_that_is_no_class_is_named_with_the_nearest_class(pets):
    save(pets / "dgo" / "1.png")
    with pytest.raises(DataError, match="dgo is no class of the model") as caught:
        load_data(pets, CLASSES)
    assert "did you mean dog;" in caught.value.remedy
    with pytest.raises(DataError) as caught:
        load_data(pets, [f"class {number}" for number in range(1000)])
    assert len(caught.value.remedy) < 250


def test_images_beside_class_folders_have_no_label_and_are_refused(pets):
    save(pets / "stray.png")
    with pytest.raises(DataError, match=r"1 images beside its folders, such as stray\.png"):
        load_data(pets, CLASSES)


@pytest.mark.parametrize("numbering", ["index", "synsets", "all"])
def test_the_layout_of_imagenet(tmp_path, numbering, monkeypatch):
    for place, wnid in enumerate(WNIDS):
        save(tmp_path / "net" / "val" / wnid / "ILSVRC2012_val_00000001.JPEG", place)
        save(tmp_path / "net" / "train" / wnid / "1.JPEG", 100)
    index = dict(zip(WNIDS, (0, 2, 338), strict=True))
    if numbering == "index":
        facts = {str(number): [wnid, "name"] for wnid, number in index.items()}
        (tmp_path / "net" / folders.INDEX).write_text(json.dumps(facts))
    elif numbering == "synsets":
        lines = [f"{wnid} a name, another" for wnid in WNIDS]
        (tmp_path / folders.SYNSETS).write_text("\n".join(lines))
        index = {wnid: place for place, wnid in enumerate(WNIDS)}
    else:
        with pytest.raises(DataError, match="3 folders called by ids of ImageNet") as caught:
            load_data(tmp_path / "net", None, spec=SMALL)
        assert folders.INDEX in caught.value.remedy
        return
    data = load_data(tmp_path / "net", ("tench", "shark"), spec=SMALL)
    assert sorted(data.labels.tolist()) == sorted(index.values())
    assert max(values(data)) < 5  # of val, not of train


def test_all_thousand_ids_of_imagenet_number_themselves(tmp_path):
    for place in range(1000):
        save(tmp_path / f"n{place:08d}" / "a.png", place % 256, (2, 2))
    data = load_data(tmp_path, None)
    assert sorted(data.labels.tolist()) == list(range(1000))
    assert all(label % 256 == value for label, value in zip(data.labels.tolist(), values(data), strict=True))


def test_a_file_of_numbers_that_cannot_be_read_is_named(tmp_path):
    save(tmp_path / WNIDS[0] / "a.png")
    (tmp_path / folders.INDEX).write_text("[1]")
    with pytest.raises(DataError, match="what numbers the classes"):
        load_data(tmp_path, None)


def test_a_flat_folder_without_labels_is_played_in_the_order_of_its_numbers(tmp_path):
    for number in (10, 9, 101, 7):
        save(tmp_path / f"frame_{number}.jpg", number)
    data = load_data(tmp_path, CLASSES, spec=SMALL)
    assert data.labels is None and data.ordered
    assert values(data) == [7, 9, 10, 101]
    save(tmp_path / "other.jpg", 200)
    unordered = load_data(tmp_path, CLASSES, spec=SMALL)
    assert unordered.labels is None and not unordered.ordered


def test_numbers_before_an_underscore_are_classes_as_far_as_there_are_such(tmp_path):
    save(tmp_path / "0002_a.png")
    save(tmp_path / "0000_b.png")
    assert load_data(tmp_path, CLASSES, spec=SMALL).labels.tolist() == [0, 2]
    save(tmp_path / "2024_holidays.png")
    with pytest.raises(DataError, match=r"2024_holidays\.png: the number before `_` is the index of a class") as caught:
        load_data(tmp_path, CLASSES, spec=SMALL)
    assert "rename" in caught.value.remedy


def test_images_get_the_size_that_the_network_is_given_them_in(tmp_path):
    """Short side and square of its resize; the network's own size where it has none."""
    save(tmp_path / "a_1.png", 1, (60, 30))
    save(tmp_path / "a_2.png", 2, (10, 40))
    assert load_data(tmp_path, None, spec=LARGE).images.shape == (2, 24, 24, 3)
    assert Preprocess(LARGE)(load_data(tmp_path, None, spec=LARGE).images).shape == (2, 3, 20, 20)
    assert load_data(tmp_path, None, spec=SMALL).images.shape == (2, 16, 16, 3)
    assert load_data(tmp_path, None).images.shape == (2, 10, 10, 3)
    grey = InputSpec(shape=(1, 8, 8))
    assert Preprocess(grey)(load_data(tmp_path, None, spec=grey).images).shape == (2, 1, 8, 8)


def test_images_of_the_right_size_are_left_as_they_are(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), np.uint8)
    for number, image in enumerate(noise):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    assert np.array_equal(load_data(tmp_path, None, spec=LARGE).images, noise)
    wide = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
    Image.fromarray(wide).save(tmp_path / "0.png")  # the short side is right: cut, and not scaled
    Image.fromarray(wide).save(tmp_path / "1.png")
    assert np.array_equal(load_data(tmp_path, None, spec=LARGE).images[0], wide[:, 3:27])


def test_a_photo_is_turned_as_the_camera_was_held(tmp_path):
    image = Image.fromarray(np.arange(16 * 8 * 3, dtype=np.uint8).reshape(16, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    assert load_data(tmp_path, None).images.shape == (1, 8, 16, 3)


def test_empty_unreadable_and_too_large(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="holds no image"):
        load_data(tmp_path, None)
    save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    with pytest.raises(DataError, match=r"2\.png is no readable image"):
        load_data(tmp_path / "a", None, spec=SMALL)
    (tmp_path / "a" / "2.png").write_bytes((tmp_path / "a" / "1.png").read_bytes()[:45])
    with pytest.raises(DataError, match=r"2\.png is no readable image"):
        load_data(tmp_path / "a", None, spec=SMALL)
    save(tmp_path / "a" / "2.png")
    monkeypatch.setattr(folders, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="more than") as caught:
        load_data(tmp_path / "a", None, spec=SMALL)
    assert "--limit 1" in caught.value.remedy
    monkeypatch.setattr(folders, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match="16 x 16 pixels"):
        load_data(tmp_path / "a", None, spec=SMALL)


def test_a_video_is_read_to_its_end_in_order(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="videos need OpenCV")
    writer = cv2.VideoWriter(str(tmp_path / "drive.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 24))
    for number in range(12):
        writer.write(np.full((24, 32, 3), 20 * number, np.uint8))
    writer.release()
    data = load_data(tmp_path / "drive.avi", CLASSES, spec=SMALL)
    assert data.images.shape == (12, 16, 16, 3)
    assert data.labels is None and data.ordered
    assert np.allclose(values(data), np.arange(12) * 20, atol=4)
    assert len(load_data(tmp_path / "drive.avi", CLASSES, spec=SMALL, limit=5)) == 5
    (tmp_path / "empty.avi").write_bytes(b"RIFF")
    with pytest.raises(DataError, match="cannot be opened"):
        load_data(tmp_path / "empty.avi")
