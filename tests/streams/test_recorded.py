"""Recorded streams: order, split, labels of their own, and what a wrong file is told."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.replay import Replay, check_labels, replay
from benchmarks.scenarios import get
from edge_adapt.errors import DataError
from edge_adapt.streams.data import Dataset, load_data
from edge_adapt.streams.recorded import RECORDED


@pytest.fixture
def har_file(tmp_path):
    """Three people, person 9 with two activities; every sample says where it stands."""
    lengths, labels, people = [256, 128, 192, 130], [0, 3, 1, 2], [9, 9, 1, 2]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    signal = np.tile(np.arange(sum(lengths), dtype=np.int16), (9, 1))
    arrays = {"segment_start": starts, "segment_length": lengths, "segment_label": labels, "segment_subject": people}
    np.savez(tmp_path / "har.npz", signal=signal, scale=np.float32(0.5), **arrays)
    return tmp_path / "har.npz"


def test_har_goes_person_by_person_in_stored_order(har_file):
    data = load_data(f"har:{har_file}")
    assert list(data.shifts) == ["subject-2", "subject-9"]
    assert data.shifts["subject-9"].shape == (4, 9, 128)
    assert data.shifts["subject-9"][:, 0, 0].tolist() == [0, 32, 64, 128]  # starts 0, 64, 128, then the next segment
    assert data.labels_of("subject-9").tolist() == [0, 0, 0, 3]
    assert data.labels_of("subject-2").tolist() == [2]


def test_har_source_is_everyone_else(har_file):
    source = load_data(f"har-source:{har_file}")
    assert source.images.shape == (2, 9, 128)
    assert source.labels.tolist() == [1, 1]


def test_usps_is_scaled_and_mnist_is_split(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "mnist_images": rng.integers(0, 256, (2010, 28, 28), np.uint8),
        "mnist_labels": rng.integers(0, 10, 2010, np.uint8),
        "usps_images": np.full((5, 16, 16), 200, np.uint8),
        "usps_labels": np.arange(5, dtype=np.uint8),
    }
    np.savez(tmp_path / "digits.npz", **arrays)
    data, source = (load_data(f"{name}:{tmp_path / 'digits.npz'}") for name in ("usps", "usps-source"))
    assert {name: frames.shape for name, frames in data.shifts.items()} == {
        "mnist": (2000, 28, 28),
        "usps": (5, 28, 28),
    }
    assert np.array_equal(data.shifts["mnist"], arrays["mnist_images"][:2000])
    assert np.array_equal(source.images, arrays["mnist_images"][2000:])
    assert np.all(data.shifts["usps"] == 200)
    assert data.labels_of("usps").tolist() == [0, 1, 2, 3, 4]


def test_pacs_splits_photos_and_mixes_classes(tmp_path):
    for domain, count in (("photo", 8), ("cartoon", 6)):
        for index, name in enumerate(("dog", "horse")):
            (tmp_path / domain / name).mkdir(parents=True)
            for number in range(count):
                image = np.full((16, 16, 3), 10 * number + 100 * index, np.uint8)
                Image.fromarray(image).save(tmp_path / domain / name / f"{number:03}.png")
    data, source = load_data(f"pacs:{tmp_path}"), load_data(f"pacs-source:{tmp_path}")
    assert {name: len(frames) for name, frames in data.shifts.items()} == {"photo": 4, "cartoon": 12}
    assert np.bincount(source.labels).tolist() == [6, 6]
    assert sorted({int(value) for value in data.shifts["photo"][:, 0, 0, 0]}) == [60, 70, 160, 170]
    labels = data.labels_of("cartoon")
    assert np.array_equal(labels, data.shifts["cartoon"][:, 0, 0, 0] // 100)
    assert (np.diff(labels) != 0).sum() > 1  # not one class after the other


def test_kws_is_dequantised_and_split(tmp_path):
    features = np.zeros((305, 49, 10), np.int8)
    np.savez(
        tmp_path / "kws.npz",
        features=features,
        scale=np.float32(0.5),
        zero_point=np.int32(-4),
        labels=np.arange(305) % 12,
    )
    data, source = (load_data(f"{name}:{tmp_path / 'kws.npz'}") for name in ("kws", "kws-source"))
    assert (len(data), len(source)) == (5, 300)
    assert np.all(data.images == 2.0)
    assert data.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", sorted(set(RECORDED) - {"pacs", "pacs-source"}))
def test_another_archive_is_named_with_what_it_holds(tmp_path, name):
    np.savez(tmp_path / "other.npz", images=np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(DataError, match=r"other\.npz holds no .*images"):
        load_data(f"{name}:{tmp_path / 'other.npz'}")


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_a_missing_file_is_a_data_error(tmp_path, name):
    with pytest.raises(DataError, match="nowhere"):
        load_data(f"{name}:{tmp_path / 'nowhere'}")


def test_an_unknown_prefix_is_told_the_known_ones():
    with pytest.raises(DataError, match="har:PATH"):
        load_data("hra:somewhere")


def own_labels(data: Dataset) -> Dataset:
    shifts = {"one": data.images[:20], "two": data.images[20:50]}
    return Dataset("own", None, None, shifts, {"one": data.labels[:20], "two": data.labels[20:50]})


def test_a_part_keeps_frames_and_labels_together(tiny_data):
    part = own_labels(tiny_data)[:25]
    assert {name: len(frames) for name, frames in part.shifts.items()} == {"one": 20, "two": 25}
    assert np.array_equal(part.labels_of("two"), tiny_data.labels[20:45])


@pytest.mark.parametrize("scenario", ["natural", "continual"])
def test_every_shift_is_scored_with_its_own_labels(device_bundle, tiny_data, scenario):
    data = own_labels(tiny_data)
    shifts = list(get(scenario).shifts(data, 5, 0, ()))
    found = [(shift.name, len(shift.images), len(shift.labels)) for shift in shifts]
    assert found == [("one", 20, 20), ("two", 30, 30)]
    row = replay(device_bundle, data, Replay(scenario=scenario, methods=("source",), batch_size=8))["rows"][0]
    whole = tiny_data[:50]
    plain = replay(device_bundle, whole, Replay(scenario="natural", methods=("source",)))["rows"][0]
    wrong = 20 * row["errors"]["one"] + 30 * row["errors"]["two"]
    assert wrong / 50 == pytest.approx(plain["errors"]["tiny"], abs=1e-2)


def test_a_shift_without_labels_has_no_error_and_shifts_no_other(device_bundle, tiny_data):
    data = own_labels(tiny_data)
    partly = Dataset("partly", None, None, data.shifts, {"two": data.shift_labels["two"]})
    plan = Replay(scenario="natural", methods=("source",))
    errors = [replay(device_bundle, each, plan)["rows"][0]["errors"] for each in (data, partly)]
    assert errors[1] == {"two": errors[0]["two"]}


def test_a_label_that_is_no_output_is_found_in_any_shift(device_bundle, tiny_data):
    data = own_labels(tiny_data)
    data.shift_labels["two"] = data.shift_labels["two"] + 5
    with pytest.raises(DataError, match="5 outputs"):
        check_labels(device_bundle, data)
