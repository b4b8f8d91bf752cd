"""Folders of images as people keep them: one folder for each class, ImageNet's layout, or a flat one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import InputSpec
from edge_adapt.errors import DataError, did_you_mean
from edge_adapt.preprocess import covering, size_for
from edge_adapt.streams.data import SUFFIXES, Dataset

Array = NDArray[Any]

PARTS = ("val", "validation", "test", "train")
"""Folders of which a data set may consist; the first that is there is replayed."""
WNID = re.compile(r"n\d{8}")
INDEX, SYNSETS = "imagenet_class_index.json", "LOC_synset_mapping.txt"
"""Files that come with ImageNet, and number its classes."""
MAX_PIXELS = 100_000_000
MAX_BYTES = 4 << 30
"""Most that is held in memory."""
SEED = 0
"""Of the order in which the images of class folders are played: such a tree has none in time."""


def image_folder(
    path: Path, classes: Sequence[str] | None, *, spec: InputSpec | None = None, limit: int | None = None
) -> Dataset:
    """One folder for each class, whose images are mixed, or a flat folder in the order of its names.

    In a flat folder `0012_anything.jpg` carries the index of its class; names that differ by a number alone, such as
    `frame_7.jpg`, are frames in the order of that number. Other flat folders have no labels.

    Args:
        classes: of the model, to number the class folders; None: these are numbered in the order of their names.
        spec: what the network takes: all images get the size that `size_for` finds for the first. None: where sizes
            differ, they are cut to the smallest.
        limit: images that are read at most.
    Raises: DataError naming the file or the folder and what is wrong with it.
    """
    path = _part(path)
    files = _images(path)
    nested = [file for file in files if file.parent != path]
    labels: Array | None = None
    ordered = False
    if nested and len(nested) < len(files):
        loose = [file.name for file in files if file.parent == path]
        raise DataError(
            f"{path} holds {len(loose)} images beside its folders, such as {loose[0]}: their class is not known",
            remedy="move them into the folder of their class",
        )
    if nested:
        labels = _labels_of_folders(path, files, classes)
        order = np.random.default_rng(SEED).permutation(len(files))
        files, labels = [files[place] for place in order], labels[order]
    else:
        labels = _labels_of_names(path, files, classes)
        numbers = None if labels is not None else _numbers(files)
        if numbers is not None:
            ordered = True
            files = [files[place] for place in np.argsort(numbers, kind="stable")]
    files, labels = files[:limit], None if labels is None else labels[:limit]
    return Dataset(path.name, stacked(path, files, spec), labels, ordered=ordered)


def images_in_order(path: Path) -> Dataset:
    """The same without mixing: one class after the other, as stored, at full size."""
    files = _images(path)
    labels = _labels_of_folders(path, files, None) if all(file.parent != path for file in files) else None
    return Dataset(path.name, stacked(path, files, None), labels)


def stacked(path: Path, files: Sequence[Path], spec: InputSpec | None) -> Array:
    """[N, H, W, C] uint8 of one size. Raises: DataError, also if they would not fit into memory."""
    if spec is None:
        images = [read_image(file, None) for file in files]
        if len({image.shape for image in images}) > 1:
            side = min(min(image.shape[:2]) for image in images)
            images = [_cropped(image, side) for image in images]
        return np.stack(images)
    first = read_image(files[0], spec)
    size = size_for(first, spec)
    first = covering(first, size)
    check_size(path.name, len(files), first)
    made = np.empty((len(files), *first.shape), np.uint8)
    for place, file in enumerate(files):
        made[place] = covering(read_image(file, spec), size)
    return made


def check_size(name: str, frames: int, image: Array) -> None:
    """Raises: DataError if so many frames like this one are too many to hold."""
    if frames * image.nbytes > MAX_BYTES:
        raise DataError(
            f"{frames} frames of {name} take {frames * image.nbytes / 1e9:.1f} GB, more than {MAX_BYTES / 1e9:.1f}",
            remedy=f"use --limit {MAX_BYTES // image.nbytes}",
        )


def read_image(file: Path, spec: InputSpec | None) -> Array:
    """[H, W, 3] uint8, or [H, W, 1] for a network of one channel; turned as the camera was held."""
    from PIL import Image, ImageOps  # only where images are read: the start of an agent waits for it

    mode = "L" if spec is not None and spec.channels == 1 else "RGB"
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                made = np.asarray(ImageOps.exif_transpose(image).convert(mode))
                return made if made.ndim == 3 else made[..., None]
    except Exception as error:  # decoders meet damaged bytes with a dozen types
        raise DataError(f"{file} is no readable image: {error}", remedy="remove or repair it") from error
    raise DataError(f"{file} has {width} x {height} pixels, at most {MAX_PIXELS} are read", remedy="make it smaller")


def _part(path: Path) -> Path:
    """Of a folder that holds nothing but `train` and `val`, the one to replay."""
    folders = {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if not folders or not folders <= set(PARTS):
        return path
    return path / next(part for part in PARTS if part in folders)


def _images(path: Path) -> list[Path]:
    """In the order of their names. Raises: DataError if there is none."""
    found = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    files = sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not files:
        raise DataError(f"{path} holds no image ({', '.join(SUFFIXES)})", remedy="check the path")
    return files


def _labels_of_folders(path: Path, files: Sequence[Path], classes: Sequence[str] | None) -> Array:
    """Index of the class of each file, by the name of the folder it is in."""
    names = [file.relative_to(path).parts[0] for file in files]
    folders = sorted(set(names))
    number = _imagenet(path, folders) or _numbered(path, folders, classes)
    return np.array([number[name] for name in names], np.int64)


def _imagenet(path: Path, folders: Sequence[str]) -> dict[str, int] | None:
    """Folder -> class where all are called by ImageNet's ids. Raises: DataError if nothing numbers these."""
    if not all(WNID.fullmatch(folder) for folder in folders):
        return None
    index = next(_indices(path), None)
    if index is not None and set(folders) <= index.keys():
        return {folder: index[folder] for folder in folders}
    if len(folders) == 1000:  # of the benchmark: the order of its ids is that of its classes
        return {folder: place for place, folder in enumerate(folders)}
    raise DataError(
        f"{path} holds {len(folders)} folders called by ids of ImageNet, and nothing says which classes these are",
        remedy=f"put {INDEX} or {SYNSETS} beside them",
    )


def _indices(path: Path) -> Iterator[dict[str, int]]:
    """What files in the folder, or in the two above it, say of ImageNet's ids."""
    for folder in (path, *islice(path.resolve().parents, 2)):
        try:
            if (folder / INDEX).is_file():
                facts = json.loads((folder / INDEX).read_text())
                yield {str(wnid): int(number) for number, (wnid, *_) in facts.items()}
            if (folder / SYNSETS).is_file():
                lines = (folder / SYNSETS).read_text().splitlines()
                yield {line.split(maxsplit=1)[0]: number for number, line in enumerate(lines) if line.strip()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"what numbers the classes in {folder} cannot be read: {error}", remedy="get that file again"
            ) from error


def _numbered(path: Path, folders: Sequence[str], classes: Sequence[str] | None) -> dict[str, int]:
    """Folder -> class, by the name of the class or by its number. Raises: DataError for one that is no class."""
    if all(folder.isdecimal() for folder in folders) and not set(folders) & set(classes or ()):
        return {folder: int(folder) for folder in folders}
    if not classes:
        return {folder: place for place, folder in enumerate(folders)}
    known = {_plain(name): place for place, name in enumerate(classes)}
    for folder in folders:
        if _plain(folder) not in known:
            raise DataError(
                f"{path / folder} is no class of the model, which knows {len(classes)}",
                remedy=f"{_nearest(folder, classes)}; images without a class lie in one flat folder",
            )
    return {folder: known[_plain(folder)] for folder in folders}


def _nearest(folder: str, classes: Sequence[str]) -> str:
    """A thousand classes are no remedy."""
    told = did_you_mean(folder, classes)
    return told.rstrip("?") if len(told) < 200 else f"known: {', '.join(sorted(classes)[:8])} and others"


def _plain(name: str) -> str:
    """Without what people change in the name of a class to make it the name of a folder."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _labels_of_names(path: Path, files: Sequence[Path], classes: Sequence[str] | None) -> Array | None:
    """From names such as `0012_anything.jpg`; None if they carry no class."""
    found = [re.match(r"(\d+)_", file.name) for file in files]
    if not all(found):
        return None
    labels = np.array([int(number.group(1)) for number in found if number], dtype=object)
    if classes and max(labels) >= len(classes):
        wrong = files[int(np.argmax(labels))].name
        raise DataError(
            f"{path / wrong}: the number before `_` is the index of a class, and the model has {len(classes)}",
            remedy="rename the images, such as frame_0001.jpg, or sort them into one folder for each class",
        )
    return labels.astype(np.int64)


def _numbers(files: Sequence[Path]) -> list[int] | None:
    """Of names that are alike but for a number at their end."""
    found = [re.fullmatch(r"(.*?)(\d{1,18})", file.stem) for file in files]
    prefixes = {match.group(1) for match in found if match}
    return [int(match.group(2)) for match in found if match] if all(found) and len(prefixes) == 1 else None


def _cropped(image: Array, side: int) -> Array:
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]
