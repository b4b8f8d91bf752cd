"""What learning costs the answers: latency with learning on against learning off, in turns, in one process.

Three ways to learn are compared: not at all, in a thread of the agent (as it does), and in a process of its own. Blocks
of each follow one another on the same stream, so that a noisy machine is noisy for all of them.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Context, Method, Observation, Step
from edge_adapt.methods.wrapper import Wrapped, Wrapper
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.budget import Budget, Limits
from edge_adapt.runtime.live import Learned, LiveLoop
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.streams.corruptions import corrupt
from edge_adapt.streams.data import Dataset
from edge_adapt.tail import Tail

Array = NDArray[Any]
Progress = Callable[[str, int, int], None]
WAYS = ("off", "thread", "process")
SHIFTS = ("clean", "fog", "gaussian_noise", "contrast")
IMAGES = 60
"""Of each shift; the stream repeats them."""
LEARN_MS_PER_S = 250.0


def agent_latency(
    bundle: Bundle,
    data: Dataset,
    *,
    method: str = "auto",
    fps: float = 15.0,
    frames: int = 150,
    rounds: int = 4,
    severity: int = 3,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Latencies in milliseconds, and ratios to `off`.

    Args:
        fps: camera pace; the other half of the blocks is flat out.
        frames: of one block.
        rounds: blocks of each way and pace.
    """
    stream = _stream(bundle, data, severity)
    taken: dict[tuple[str, str], list[float]] = {}
    missed = dict.fromkeys(WAYS, 0)
    facts: dict[str, Any] = {}
    done, total = 0, rounds * len(WAYS) * 2
    with _learners(bundle, method) as ways:
        for turn in range(rounds):
            for way in WAYS[turn % 3 :] + WAYS[: turn % 3]:
                for pace, period in (("camera", 1 / fps), ("flat out", 0.0)):
                    block, late = _block(ways[way], stream, frames, period, turn)
                    taken.setdefault((pace, way), []).extend(block)
                    missed[way] += late
                    progress("blocks", done := done + 1, total)
        for way in WAYS:
            facts[way] = {"steps": ways[way].steps(), "missed_at_camera_pace": missed[way]}
    rows = [_row(pace, way, taken) for pace in ("camera", "flat out") for way in WAYS]
    return {
        "schema": 1,
        "bundle": {"name": bundle.manifest.name, "id": bundle.id},
        "settings": {
            "method": method,
            "fps": fps,
            "frames": frames,
            "rounds": rounds,
            "learn_ms_per_s": LEARN_MS_PER_S,
        },
        "rows": rows,
        "facts": facts,
    }


def _row(pace: str, way: str, taken: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    values, base = (1000 * np.array(taken[pace, name]) for name in (way, "off"))
    row: dict[str, Any] = {"pace": pace, "learning": way, "answers": len(values)}
    for share in (50, 99):
        own, plain = (float(np.percentile(each, share)) for each in (values, base))
        row[f"p{share}_ms"], row[f"p{share}_ratio"] = round(own, 3), round(own / plain, 3)
    return row


def _stream(bundle: Bundle, data: Dataset, severity: int) -> Array:
    """Frames as the network is fed, [N, ...]: each shift in turn."""
    assert data.images is not None
    images = data.images[:IMAGES]
    preprocess = Preprocess(bundle.manifest.input)
    parts = [images if name == "clean" else corrupt(_sized(bundle, images), name, severity, seed=0) for name in SHIFTS]
    return np.concatenate([preprocess(part) for part in parts])


def _sized(bundle: Bundle, images: Array) -> Array:
    """Images at the size of the network, uint8 [N, H, W, C], so that corruptions are of the strength they are meant."""
    arranged = Preprocess(bundle.manifest.input).arranged(images)
    return np.ascontiguousarray(arranged.transpose(0, 2, 3, 1)) if arranged.shape[1] in (1, 3) else arranged


def _block(way: _Way, stream: Array, frames: int, period: float, turn: int) -> tuple[list[float], int]:
    """Seconds of each answer, and how many were not done when the next frame came."""
    taken, late = [], 0
    with way.working():
        due = time.perf_counter()
        for index in range(frames):
            if period:
                time.sleep(max(0.0, due - time.perf_counter()))
                due = max(due + period, time.perf_counter() - period)
            frame = stream[(turn * frames + index) % len(stream)][None]
            started = time.perf_counter()
            way.answer(frame)
            taken.append(time.perf_counter() - started)
            late += bool(period) and taken[-1] > period
    return taken, late


class _Way:
    """Nothing is learned: what the others are compared with."""

    def __init__(self, bundle: Bundle, method: Method[Any]) -> None:
        predictor = Predictor(bundle, OnnxRuntimeEngine(bundle))
        begin: Learned[Any] = replace(Learned(method.init()), frozen=type(self) is _Way)
        budget = Budget(Limits(LEARN_MS_PER_S), time.monotonic)
        self.loop: LiveLoop[Any] = LiveLoop(predictor, method, budget, begin=begin)
        for _ in range(3):
            predictor.answer(np.zeros((1, *bundle.manifest.input.shape), np.float32))

    def answer(self, frame: Array) -> None:
        self.loop.answer(frame)

    def steps(self) -> int:
        return self.loop.counts["steps"]

    @contextmanager
    def working(self) -> Iterator[None]:
        yield


class _Thread(_Way):
    """The agent's way."""

    @contextmanager
    def working(self) -> Iterator[None]:
        stop = threading.Event()

        def learn() -> None:
            while not stop.is_set():
                self.loop.work(0.05)

        learner = threading.Thread(target=learn, daemon=True)
        learner.start()
        yield
        stop.set()
        learner.join()


class _Process(_Thread):
    """The method steps in another process; what was seen goes there, a delta comes back."""

    def __init__(self, bundle: Bundle, method: Method[Any], name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._child = context.Process(target=_child, args=(bundle.path, name, there), daemon=True)
        self._child.start()
        super().__init__(bundle, _Far(Context(bundle, lambda: Tail(bundle)), method, self._pipe))
        assert self._pipe.recv() == "ready"

    def close(self) -> None:
        self._pipe.close()
        self._child.join(10)


class _Far(Wrapper[Delta]):
    """A method whose steps are taken at the other end of a pipe. What it makes of every answer is left out here."""

    def __init__(self, context: Context, host: Method[Any], pipe: Connection) -> None:
        super().__init__(context, host)
        self.watches = frozenset()
        self._pipe = pipe

    def start(self) -> Delta:
        return Delta.source()

    def step(self, state: Wrapped[Delta], seen: Observation) -> Step[Wrapped[Delta]]:
        self._pipe.send(replace(seen, trunk=None, rehearse=None, delta=None))
        host, tensors = self._pipe.recv()
        return Step(Wrapped(host, state.own if tensors is None else Delta(tensors)))

    def delta(self, state: Wrapped[Delta]) -> Delta:
        return state.own


def _child(path: Path, name: str, pipe: Connection) -> None:
    """The learner's process: its own tail and, for trials and views, its own engine."""
    from edge_adapt.threads import one_thread

    one_thread()
    bundle = Bundle.load(path)
    method = build(name, Context(bundle, lambda: Tail(bundle)))
    predictor = Predictor(bundle, OnnxRuntimeEngine(bundle))
    state, sent = method.init(), None
    needs = method.needs | method.watches
    pipe.send("ready")
    while True:
        try:
            seen = pipe.recv()
        except EOFError:
            return
        whole = replace(
            seen,
            trunk=predictor.trunk,
            rehearse=lambda frames, delta: predictor.rehearse(frames, delta, needs),
            delta=method.delta(state),
        )
        state = method.step(state, whole).state
        made = method.delta(state)
        pipe.send((state, None if made is sent else dict(made)))
        sent = made


@contextmanager
def _learners(bundle: Bundle, name: str) -> Iterator[dict[str, _Way]]:
    def method() -> Method[Any]:
        return build(name, Context(bundle, lambda: Tail(bundle)))

    far = _Process(bundle, method(), name)
    try:
        yield {"off": _Way(bundle, method()), "thread": _Thread(bundle, method()), "process": far}
    finally:
        far.close()
