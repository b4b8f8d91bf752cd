"""Promises of engines, sources and scenarios."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import scenarios
from benchmarks.contract.stand import Broken, Inapplicable, Promise, Stand, hold
from benchmarks.scenarios import Shift
from edge_adapt.delta import Delta
from edge_adapt.engines.protocol import Engine
from edge_adapt.engines.torch import TorchEngine
from edge_adapt.errors import DataError
from edge_adapt.merge import Merger
from edge_adapt.plugins import ENGINES, SOURCES, find
from edge_adapt.streams.data import Dataset
from edge_adapt.streams.live.protocol import Frame, FrameSource, SourceEnded

Array = NDArray[Any]

TOLERANCE = 1e-3
"""Of what an engine gives against torch, absolute and relative, unless its class has a `tolerance` of its own."""
ENOUGH = 64
"""Frames of a source that are looked at."""
SEVERITY = 3


@dataclass(frozen=True)
class Subject:
    """An engine, a source or a scenario to try."""

    group: str
    name: str


@contextmanager
def built(stand: Stand, subject: Subject) -> Iterator[tuple[Engine, TorchEngine]]:
    """The engine, and the one it is compared with. Raises: Inapplicable where it cannot run."""
    kind = find(ENGINES, subject.name)
    if reason := kind.probe():
        raise Inapplicable(f"cannot run here: {reason}")
    engine, plain = kind(stand.bundle, threads=1), TorchEngine(stand.bundle)
    try:
        yield engine, plain
    finally:
        engine.close()
        plain.close()


def near(first: Array, second: Array, engine: Engine) -> bool:
    """True if they are of one shape and equal but for rounding, which an engine of fewer bits states itself."""
    tolerance = getattr(engine, "tolerance", TOLERANCE)
    return first.shape == second.shape and bool(np.allclose(first, second, rtol=tolerance, atol=tolerance))


def adapted(stand: Stand) -> Delta:
    """A delta of all ports that changes answers."""
    width = len(Merger(stand.bundle).weight)
    wave = np.sin(np.arange(width, dtype=np.float32))
    return Delta.of_ports(1 + 0.2 * wave, 0.3 * wave[::-1])


def probes(stand: Stand, subject: Subject) -> None:
    reason = find(ENGINES, subject.name).probe()
    hold(reason is None or (isinstance(reason, str) and bool(reason)), f"probe() gives {reason!r}")
    with built(stand, subject) as (engine, _):
        text = engine.description
        hold(isinstance(text, str) and text != "" and "\n" not in text, f"description is {text!r}, expected one line")
        engine.close()  # and once more on leaving: twice is allowed


def answers_as_torch_does(stand: Stand, subject: Subject) -> None:
    with built(stand, subject) as (engine, plain):
        for count in (1, 5, 64):
            frames = stand.frames[:count]
            hold(near(engine.run(frames), plain.run(frames), engine), f"answers to {count} frames are not torch's")


def lets_the_outside_look_inside(stand: Stand, subject: Subject) -> None:
    with built(stand, subject) as (engine, plain):
        wanted = {"cut": True, "taps": True, "features": True}
        seen, expected = (made.observe(stand.frames[:8], **wanted) for made in (engine, plain))
        for name in ("logits", *wanted):
            one, other = getattr(seen, name), getattr(expected, name)
            hold((one is None) == (other is None), f"observe() gives no {name}")
            hold(one is None or near(one, other, engine), f"{name} of observe() is not torch's")
        bare = engine.observe(stand.frames[:8])
        hold(near(bare.logits, expected.logits, engine), "observe() of nothing gives another answer")


def takes_weights_and_gives_them_back(stand: Stand, subject: Subject) -> None:
    merge, frames = Merger(stand.bundle), stand.frames[:16]
    source, other = merge(Delta.source()), merge(adapted(stand))
    with built(stand, subject) as (engine, plain):
        engine.apply(source)
        before = engine.run(frames)
        rehearsed = engine.rehearse(other, frames).logits
        hold(np.array_equal(engine.run(frames), before), "rehearse() changes what is in force")
        engine.apply(other, "tag")
        plain.apply(other)
        after = engine.observe(frames)
        hold(after.tag == "tag", f"the tag of apply() comes back as {after.tag!r}")
        hold(near(after.logits, plain.run(frames), engine), "with other weights its answers are not torch's")
        hold(not near(after.logits, before, engine), "other weights make no difference")
        hold(near(rehearsed, after.logits, engine), "rehearse() answers as apply() does not")
        engine.apply(source)
        hold(np.array_equal(engine.run(frames), before), "source does not come back bit for bit")


def played(subject: Subject, **settings: Any) -> tuple[FrameSource, list[Frame]]:
    """A source of its own example, opened, and its first frames. Raises: Inapplicable without an example."""
    kind = find(SOURCES, subject.name)
    if not isinstance(getattr(kind, "example", None), str):
        raise Inapplicable("has no `example`, a place that can be played anywhere")
    source: FrameSource = kind(kind.example, **settings)
    source.open()
    return source, list(_frames(source))


def _frames(source: FrameSource) -> Iterator[Frame]:
    with suppress(SourceEnded):
        for _ in range(ENOUGH):
            frame = source.read(1.0)
            if frame is not None:
                yield frame


def frames_are_numbered_and_owned(stand: Stand, subject: Subject) -> None:
    source, frames = played(subject)
    kept = [frame.image.copy() for frame in frames]
    list(_frames(source))
    source.close()
    hold(isinstance(source.paced, bool), f"paced is {source.paced!r}, expected true or false")
    hold(bool(frames), "its example gives no frame")
    hold([frame.number for frame in frames] == list(range(len(frames))), "frames are not numbered from 0 on")
    hold(all(one.captured <= other.captured for one, other in pairwise(frames)), "times go backwards")
    hold(all(isinstance(frame.name, str) for frame in frames), "the name of a frame is no text")
    for frame, image in zip(frames, kept, strict=True):
        hold(frame.image.dtype == np.uint8 or frame.image.dtype.kind == "f", f"frames have dtype {frame.image.dtype}")
        hold(frame.image.ndim in (2, 3), f"frames have shape {frame.image.shape}, expected [H, W] or [H, W, 3]")
        hold(np.array_equal(frame.image, image), "a frame changes after it was handed over")


def channels_are_as_asked(stand: Stand, subject: Subject) -> None:
    for channels in (1, 3):
        source, frames = played(subject, channels=channels)
        source.close()
        if frames and frames[0].image.dtype == np.uint8:
            shape = frames[0].image.shape
            wanted = len(shape) == 2 if channels == 1 else len(shape) == 3 and shape[2] == 3
            hold(wanted, f"asked for {channels} channels, frames have shape {shape}")


def closes_twice_and_opens_again(stand: Stand, subject: Subject) -> None:
    source, frames = played(subject)
    source.close()
    source.close()
    source.open()
    again = list(_frames(source))
    source.close()
    hold(bool(again), "gives no frame after it was closed and opened again")
    hold(again[0].number == len(frames), "numbers do not go on where they were before it was closed")


DATA = ("images", "ready-made shifts", "recording")


def datasets(stand: Stand) -> dict[str, Dataset]:
    """What a scenario may be played on."""
    images, labels = stand.data.images, stand.data.labels
    assert images is not None
    shifts = {"gaussian_noise": images // 2, "fog": 255 - images, "clean": images}
    made = (
        Dataset("images", images, labels),
        Dataset("ready-made", None, labels, shifts),
        Dataset("recording", images, None, ordered=True, gaps=(50,)),
    )
    return dict(zip(DATA, made, strict=True))


def playable(stand: Stand, subject: Subject) -> Iterator[tuple[str, Dataset, list[Shift]]]:
    """Each data set that the scenario takes, and its shifts. Raises: Broken if it takes none."""
    scenario, refusals = scenarios.get(subject.name), []
    for name, data in datasets(stand).items():
        try:
            yield name, data, list(scenario.play(data, SEVERITY, 0))
        except DataError as error:
            refusals.append(error.what)
    if len(refusals) == len(DATA):
        raise Broken(f"takes no data: {refusals[0]}")


def the_seed_alone_decides(stand: Stand, subject: Subject) -> None:
    scenario = scenarios.get(subject.name)
    for name, data, shifts in playable(stand, subject):
        np.random.seed(12345)  # which a scenario must not depend on
        again = list(scenario.play(data, SEVERITY, 0))
        hold([shift.name for shift in again] == [shift.name for shift in shifts], f"{name}: other shifts, same seed")
        for one, other in zip(shifts, again, strict=True):
            same = np.array_equal(one.images[:], other.images[:])
            labels = [shift.labels for shift in (one, other) if shift.labels is not None]
            same = same and (not labels or (len(labels) == 2 and np.array_equal(labels[0], labels[1])))
            hold(same, f"{name}: the same seed gives other frames or labels in {one.name}")


def each_frame_has_its_facts(stand: Stand, subject: Subject) -> None:
    for name, data, shifts in playable(stand, subject):
        hold(any(len(shift.images) for shift in shifts), f"{name}: gives no frame")
        known = set() if data.labels is None else set(data.labels.tolist())
        for shift in shifts:
            count = len(shift.images)
            hold(shift.images[:].shape == (count, *stand.data.images.shape[1:]), f"{name}: frames changed their shape")  # type: ignore[union-attr]
            hold(shift.images[:].dtype == np.uint8, f"{name}: frames changed their type")
            for fact in ("labels", "domains", "counts"):
                value = getattr(shift, fact)
                hold(value is None or len(value) == count, f"{name}: {fact} of {shift.name} are not one a frame")
            if shift.labels is not None:
                scored = shift.labels if shift.counts is None else shift.labels[shift.counts]
                hold(set(scored.tolist()) <= known, f"{name}: {shift.name} has labels that the data do not have")
            hold(data.labels is not None or shift.labels is None, f"{name}: makes labels up")


def the_data_stay_as_they_are(stand: Stand, subject: Subject) -> None:
    for name, data, _ in playable(stand, subject):
        given = [*data.shifts.values(), *(part for part in (data.images, data.labels) if part is not None)]
        kept = [part.copy() for part in given]
        for shift in scenarios.get(subject.name).play(data, SEVERITY, 1):
            shift.images[:]
        same = all(np.array_equal(part, copy) for part, copy in zip(given, kept, strict=True))
        hold(same, f"{name}: changes the frames or the labels that it is given")


ENGINE_PROMISES = (
    Promise("says whether it can run", probes),
    Promise("answers as torch does", answers_as_torch_does),
    Promise("lets the outside look inside", lets_the_outside_look_inside),
    Promise("takes weights and gives them back", takes_weights_and_gives_them_back),
)
SOURCE_PROMISES = (
    Promise("frames are numbered and owned", frames_are_numbered_and_owned),
    Promise("channels are as asked", channels_are_as_asked),
    Promise("closes twice and opens again", closes_twice_and_opens_again),
)
SCENARIO_PROMISES = (
    Promise("the seed alone decides", the_seed_alone_decides),
    Promise("each frame has its facts", each_frame_has_its_facts),
    Promise("the data stay as they are", the_data_stay_as_they_are),
)
