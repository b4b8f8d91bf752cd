"""Frames and labels from where users keep them: NumPy archives, folders, videos, scikit-learn's digits."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.errors import DataError

if TYPE_CHECKING:
    from edge_adapt.bundle import InputSpec

Array = NDArray[Any]

DIGITS = "sklearn:digits"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
NOT_SHIFTS = {"images", "labels", "lossless", "train_index", "test_index", "sample_index", "class_names"}


@dataclass(frozen=True)
class Dataset:
    """Frames with labels for the score; labels never reach a method.

    Either `images`, or `shifts`: one ready-made array for each shift. A shift has the labels that `shift_labels` holds
    for it, such as those of one person or one domain; where there are none, all shifts share `labels`.
    """

    name: str
    images: Array | None
    labels: Array | None
    shifts: dict[str, Array] = field(default_factory=dict)
    shift_labels: dict[str, Array] = field(default_factory=dict)
    ordered: bool = False
    """True if the frames are in the order of time in which a camera or a sensor met them."""
    gaps: tuple[int, ...] = ()
    """Places in `images`, rising, before which some time was not recorded."""

    def __len__(self) -> int:
        """Frames of `images`, or of the first shift."""
        first = self.images if self.images is not None else next(iter(self.shifts.values()))
        return len(first)

    def __getitem__(self, part: slice | Array) -> Dataset:
        """Some of the frames, a slice or their indices, of every shift, with their labels."""
        return Dataset(
            self.name,
            None if self.images is None else self.images[part],
            None if self.labels is None else self.labels[part],
            {name: images[part] for name, images in self.shifts.items()},
            {name: labels[part] for name, labels in self.shift_labels.items()},
            self.ordered and isinstance(part, slice) and (part.step or 1) > 0,
            self._gaps_in(part),
        )

    def _gaps_in(self, part: slice | Array) -> tuple[int, ...]:
        """Where a slice of the frames has its gaps; a step leaves out frames everywhere, which is no gap."""
        if not self.gaps or not isinstance(part, slice):
            return ()
        start, stop, step = part.indices(len(self))
        places = (-(-(gap - start) // step) for gap in self.gaps if start < gap < stop) if step > 0 else ()
        return tuple(dict.fromkeys(places))

    def labels_of(self, shift: str) -> Array | None:
        """Labels of one shift: its own, or those that all share."""
        return self.shift_labels.get(shift, self.labels)


def load_data(
    source: str | Path,
    classes: Sequence[str] | None = None,
    *,
    spec: InputSpec | None = None,
    limit: int | None = None,
) -> Dataset:
    """Read a data set.

    Args:
        source: a .npz archive, a folder of images, a video file, the recording of an agent, `sklearn:digits`, a data
            set that `recorded.py` knows, such as `har:PATH` for its stream and `har-source:PATH` for what its model
            saw, or `KIND:PLACE` for a source of frames that a package brings.
        classes: class names of the model, to number the folders of an image folder.
        spec: what the model takes, for images and videos of another size; archives are taken as they are.
        limit: frames that are read at most of a folder, a video or a source.
    Raises: DataError naming the file and what is wrong with it.
    """
    from edge_adapt.plugins import SOURCES, names
    from edge_adapt.streams.folders import image_folder
    from edge_adapt.streams.played import VIDEOS, load_source, load_video
    from edge_adapt.streams.recorded import RECORDED
    from edge_adapt.streams.recording import is_recording, load_recording

    if str(source) == DIGITS:
        return digits()
    kind, colon, place = str(source).partition(":")
    if colon and kind in RECORDED:
        return RECORDED[kind](Path(place))
    path = Path(source)
    if path.is_dir():
        recording = next((folder for folder in (path, path / "recording") if is_recording(folder)), None)
        return image_folder(path, classes, spec=spec, limit=limit) if recording is None else load_recording(recording)
    if path.suffix.lower() in VIDEOS and path.exists():
        return load_video(path, spec=spec, limit=limit)
    if path.exists():
        return archive(path)
    if colon and kind in names(SOURCES):
        return load_source(kind, place, spec=spec, limit=limit)
    known = ", ".join(f"{name}:PATH" for name in (*RECORDED, *names(SOURCES)))
    raise DataError(
        f"{path} does not exist", remedy=f"give an .npz archive, an image folder, a video, {DIGITS}, or {known}"
    )


def archive(path: Path) -> Dataset:
    """An .npz with `images` and `labels`, or with one array for each ready-made shift beside `labels`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no readable .npz archive: {error}", remedy="write it with numpy.savez") from error
    labels = arrays.get("labels")
    images = arrays.get("images")
    shifts = {}
    if images is None:
        shifts = {name: array for name, array in arrays.items() if name not in NOT_SHIFTS and array.ndim >= 3}
    if images is None and not shifts:
        raise DataError(
            f"{path} holds neither `images` nor one array for each shift (it holds {', '.join(arrays) or 'nothing'})",
            remedy="name the frames `images`, [N, H, W, C] uint8",
        )
    for name, array in {"images": images, **shifts}.items():
        if array is not None and array.ndim < 2:
            raise DataError(
                f"{path}: {name} has shape {array.shape}, expected one frame after the other",
                remedy="store the frames as [N, H, W, C] uint8",
            )
        if array is not None and labels is not None and len(array) != len(labels):
            raise DataError(
                f"{path}: {name} has {len(array)} frames, labels has {len(labels)} entries",
                remedy="store one label for each frame",
            )
        if array is not None and np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise DataError(f"{path}: {name} holds NaN or infinite values", remedy="remove those frames")
    if labels is not None and (labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer)):
        raise DataError(
            f"{path}: labels has shape {labels.shape} and dtype {labels.dtype}, expected one integer a frame",
            remedy="store class indices",
        )
    return Dataset(path.stem, images, None if labels is None else labels.astype(np.int64), shifts)


def digits() -> Dataset:
    """The 1,797 handwritten digits that come with scikit-learn: 8 x 8, scaled to 32 x 32 and 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"{DIGITS} needs scikit-learn", remedy="pip install 'edge-adapt[demo]'") from error
    raw = load_digits()
    small = np.round(raw.images / 16 * 255).astype(np.uint8)
    from PIL import Image  # not for archives: the start of an agent waits for it

    images = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in small]
    return Dataset("digits", np.stack(images)[..., None], raw.target.astype(np.int64))
