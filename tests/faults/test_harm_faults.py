"""Streams that mislead a learner, played to a whole agent: rows 20 and 21."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
from agents import calm_board, settings, stream, until

from benchmarks import demo
from device_agents.agent import Agent
from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.live import Reply
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.streams.data import Dataset
from exporters.export import export, from_module

__all__ = ["calm_board", "settings", "stream"]
pytestmark = pytest.mark.usefixtures("calm_board")
PLENTY = {"learn_ms_per_s": 1000.0}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Bundle, Dataset]:
    """A trained network and images that it has not seen; the weights are those of `edge-adapt demo`."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    train, test = demo._halves()
    net = demo._trained(train, lambda what, done, total: None, lambda line: None)
    model = from_module(net, "digits", demo.INPUT, classes=[str(digit) for digit in range(10)])
    folder = export(model, tmp_path_factory.mktemp("digits") / "bundle", calibration=train.images, cut="blocks.2")
    return Bundle.load(folder), test


def source_share(bundle: Bundle, images: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of the model as exported, in per cent."""
    with closing(OnnxRuntimeEngine(bundle)) as engine:
        best = Predictor(bundle, engine).answer(Preprocess(bundle.manifest.input)(images)).logits.argmax(1)
    return 100 * float((best == labels).mean())


def noisy(images: np.ndarray, seed: int) -> np.ndarray:
    """The same pictures, never the same bytes."""
    noise = np.random.default_rng(seed).normal(0, 4, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


NOTICED = 200
"""Frames after which it has noticed that the scene is another one."""


def unharmed_by(between: np.ndarray, digits, settings, tmp_path, method: str) -> Agent:
    """R8: play clean images, `between`, clean images; these are answered at most a point worse than by source.

    Frames come as fast as they are learned from. Faster, a busy machine decides how many of them are looked at, and so
    how many pass until a change is noticed, which is no harm of what was learned.
    """
    bundle, data = digits
    first, last = noisy(data.images, 1), noisy(data.images, 2)
    np.savez(tmp_path / "all.npz", a=first, b=between, c=last)
    source = {"path": tmp_path / "all.npz", "loop": False, "batch": 4}
    agent = Agent(settings(bundle=bundle.path, source=source, budget=PLENTY, method={"name": method}))
    best: list[np.ndarray] = []
    letters = 0

    def answered(frames: object, reply: Reply) -> None:
        nonlocal letters
        best.append(reply.logits.argmax(1))
        letters += sum(reply.posted)
        until(lambda: agent.core.loop.learned.done >= letters, "it never learned from what it was sent", every_s=0.001)

    agent.listen(answered)
    assert agent.run() == 0
    classes = np.concatenate(best)
    assert len(classes) == len(first) + len(between) + len(last), "every frame was answered"
    again, labels = last[NOTICED:], data.labels[NOTICED:]
    share = 100 * float((classes[-len(again) :] == labels).mean())
    assert share >= source_share(bundle, again, labels) - 1
    return agent


@pytest.mark.fault(20)
@pytest.mark.parametrize("method", ["auto", "tent"])
def test_five_thousand_frames_of_one_class_do_no_harm(settings, tmp_path, digits, method):
    """R8: after a long burst of one class it is at most a point worse than source."""
    _, data = digits
    ones = data.images[data.labels == 1]
    agent = unharmed_by(noisy(ones[np.arange(5000) % len(ones)], 3), digits, settings, tmp_path, method)
    assert agent.board.status.learn["steps"] > 0


@pytest.mark.fault(21)
@pytest.mark.parametrize("kind", ["in between", "all at once"])
def test_a_flood_of_noise_is_told_and_does_no_harm(settings, tmp_path, digits, kind):
    """R7, R8: a flood of noise is told as another domain, noise in between is borne; neither does harm."""
    _, data = digits
    noise = np.random.default_rng(4).integers(0, 256, (2000, *data.images.shape[1:]), np.uint8)
    if kind == "in between":
        plain = np.arange(len(noise)) % 8 != 0
        noise[plain] = noisy(data.images[np.arange(plain.sum()) % len(data.images)], 5)
    agent = unharmed_by(noise, digits, settings, tmp_path, "auto")
    flags = agent.lookout.guards["domain change"] + agent.lookout.guards["guard: strange frame"]
    assert flags or kind == "in between"
