"""Well-known recordings with a natural shift, in the layout in which they are published: `har:PATH`, `usps:PATH`, ...

Each has a stream to replay, and a source part under `<name>-source:PATH`, from which a model is calibrated.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_adapt.errors import DataError
from edge_adapt.streams.data import Dataset
from edge_adapt.streams.folders import images_in_order

Array = NDArray[Any]

UNSEEN_PEOPLE = (2, 4, 9, 10, 12, 13, 18, 20, 24)
"""The official test subjects of UCI HAR."""
WINDOW, HOP = 128, 64
"""Samples of a window, and from one window to the next: 2.56 s and 1.28 s at 50 Hz."""
DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
"""Of PACS, in the order of growing distance from photographs."""
SOURCE_PHOTOS = 0.75
"""Share of the photos of each class, the first by name, that belongs to the source."""
SOURCE_DIGITS = 2000
"""MNIST images from here on belong to the source; those before are the unshifted start of the stream."""
SOURCE_KEYWORDS = 300
"""Recordings before this one belong to the source."""


def har(path: Path) -> Dataset:
    """UCI HAR, the people that the published models never saw, one after the other: windows [N, 9, 128] float32.

    Accelerations in g and angular velocities in rad/s, not standardised. Within a person the windows come as stored:
    one activity after the other, half of each window shared with the next.
    Source: Anguita et al., "A Public Domain Dataset for Human Activity Recognition Using Smartphones", ESANN 2013.
    """
    people = {person: part for person, part in _people(path).items() if person in UNSEEN_PEOPLE}
    return replace(_in_order("har", {f"subject-{person}": part for person, part in people.items()}), ordered=True)


def har_source(path: Path) -> Dataset:
    """The people that the published models were trained on, as one array."""
    people = [part for person, part in _people(path).items() if person not in UNSEEN_PEOPLE]
    if not people:
        raise DataError(f"{path} holds nobody that models were trained on", remedy="use the whole recording")
    windows, labels = zip(*people, strict=True)
    return Dataset("har-source", np.concatenate(windows), np.concatenate(labels))


def usps(path: Path) -> Dataset:
    """MNIST, then USPS scaled to the same 28 x 28: white digits on black, [N, 28, 28] uint8.

    Source: LeCun et al., Proceedings of the IEEE 1998; Hull, IEEE TPAMI 1994.
    """
    arrays = _arrays(path, "mnist_images", "mnist_labels", "usps_images", "usps_labels")
    small = [Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR) for image in arrays["usps_images"]]
    return _in_order(
        "usps",
        {
            "mnist": (arrays["mnist_images"][:SOURCE_DIGITS], arrays["mnist_labels"][:SOURCE_DIGITS]),
            "usps": (np.stack([np.asarray(image) for image in small]), arrays["usps_labels"]),
        },
    )


def usps_source(path: Path) -> Dataset:
    """The MNIST images that the stream leaves out."""
    arrays = _arrays(path, "mnist_images", "mnist_labels")
    labels = arrays["mnist_labels"][SOURCE_DIGITS:].astype(np.int64)
    return Dataset("usps-source", arrays["mnist_images"][SOURCE_DIGITS:], labels)


def pacs(path: Path) -> Dataset:
    """PACS: photos that the source leaves out, then paintings, cartoons and sketches; classes mixed, seed 0.

    Source: Li et al., "Deeper, Broader and Artier Domain Generalization", ICCV 2017.
    """
    parts = {}
    for domain in DOMAINS:
        if not (path / domain).is_dir():
            continue
        images, labels = _labelled(path / domain)
        if domain == DOMAINS[0]:
            images, labels = images[~_first(labels)], labels[~_first(labels)]
        order = np.random.default_rng(0).permutation(len(labels))
        parts[domain] = (images[order], labels[order])
    if not parts:
        raise DataError(f"{path} holds none of the folders {', '.join(DOMAINS)}", remedy="give the folder above them")
    return _in_order("pacs", parts)


def pacs_source(path: Path) -> Dataset:
    """The first three quarters of the photos of each class, by name."""
    images, labels = _labelled(path / DOMAINS[0])
    kept = _first(labels)
    return Dataset("pacs-source", images[kept], labels[kept])


def kws(path: Path) -> Dataset:
    """Keyword recordings of MLPerf Tiny as MFCC, [N, 49, 10] float32: real, and not shifted.

    Source: Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition", 2018.
    """
    features, labels = _keywords(path)
    return Dataset("kws", features[SOURCE_KEYWORDS:], labels[SOURCE_KEYWORDS:])


def kws_source(path: Path) -> Dataset:
    """The recordings that the stream leaves out."""
    features, labels = _keywords(path)
    return Dataset("kws-source", features[:SOURCE_KEYWORDS], labels[:SOURCE_KEYWORDS])


RECORDED: dict[str, Callable[[Path], Dataset]] = {
    "har": har,
    "har-source": har_source,
    "usps": usps,
    "usps-source": usps_source,
    "pacs": pacs,
    "pacs-source": pacs_source,
    "kws": kws,
    "kws-source": kws_source,
}


def _people(path: Path) -> dict[int, tuple[Array, Array]]:
    """Subject -> windows and activities, as stored."""
    names = ("segment_start", "segment_length", "segment_label", "segment_subject")
    arrays = _arrays(path, "signal", "scale", *names)
    signal = arrays["signal"].astype(np.float32) * np.float32(arrays["scale"])
    windows: dict[int, list[Array]] = {}
    labels: dict[int, list[int]] = {}
    for start, length, label, person in zip(*(arrays[name].tolist() for name in names), strict=True):
        for place in range(start, start + length - WINDOW + 1, HOP):
            windows.setdefault(person, []).append(signal[:, place : place + WINDOW])
            labels.setdefault(person, []).append(label)
    return {person: (np.stack(windows[person]), np.array(labels[person])) for person in sorted(windows)}


def _labelled(path: Path) -> tuple[Array, Array]:
    data = images_in_order(path)
    if data.images is None or data.labels is None:
        raise DataError(f"{path} has no folder for each class", remedy="give the folder above photo/, cartoon/, ...")
    return data.images, data.labels


def _first(labels: Array) -> Array:
    """True for the first three quarters of each class, in stored order."""
    kept = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        kept[rows[: round(SOURCE_PHOTOS * len(rows))]] = True
    return kept


def _keywords(path: Path) -> tuple[Array, Array]:
    arrays = _arrays(path, "features", "scale", "zero_point", "labels")
    levels = arrays["features"].astype(np.float32) - np.float32(arrays["zero_point"])
    return levels * np.float32(arrays["scale"]), arrays["labels"].astype(np.int64)


def _in_order(name: str, parts: dict[str, tuple[Array, Array]]) -> Dataset:
    """One shift after the other, each with its own labels."""
    if not parts:
        raise DataError(f"{name} holds nobody to replay", remedy="use the file with the official test subjects")
    shifts = {part: frames for part, (frames, _) in parts.items()}
    labels = {part: marks.astype(np.int64) for part, (_, marks) in parts.items()}
    return Dataset(name, None, None, shifts, labels)


def _arrays(path: Path, *names: str) -> dict[str, Array]:
    """Named arrays of an archive. Raises: DataError naming the first one that is missing."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing: Sequence[str] = [name for name in names if name not in file.files]
            if missing:
                raise DataError(
                    f"{path} holds no {missing[0]} (it holds {', '.join(file.files) or 'nothing'})",
                    remedy="use the archive that belongs to this name, or plain --data PATH",
                )
            return {name: file[name] for name in names}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no readable .npz archive: {error}", remedy="check the path") from error
