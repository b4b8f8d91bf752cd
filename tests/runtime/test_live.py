"""The live loop: answers leave at once, learning follows, and a recorded run can be done again."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError, StateError
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import TAPS, Context, Step
from edge_adapt.runtime.budget import Budget, Limits
from edge_adapt.runtime.live import GIVEN, SOURCE, Learned, LiveLoop
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.runtime.probation import Probation
from edge_adapt.runtime.scripted import ScriptedLoop
from edge_adapt.tail import Tail

PLENTY = Limits(learn_ms_per_s=1e9)


@pytest.fixture(scope="module")
def made(device_bundle):
    """A loop of any kind, with a fresh engine; events land in `.events`."""

    def build_loop(name="moments", kind=LiveLoop, limits=PLENTY, method=None, guards=True, **facts):
        context = Context(device_bundle, lambda: Tail(device_bundle), settings={"guards": guards})
        method = method or build(name, context)
        predictor = Predictor(device_bundle, OnnxRuntimeEngine(device_bundle))
        events: list[str] = []
        loop = kind(predictor, method, Budget(limits, lambda: 0.0), tell=events.append, **facts)
        loop.events = events
        return loop

    return build_loop


def dark(frames):
    return frames * 0.4 - 0.5


class Broken:
    """A method whose steps fail."""

    name, requires, needs, watches, answers = "broken", frozenset(), frozenset({TAPS}), frozenset(), False

    def __init__(self, error: Exception) -> None:
        self.error = error

    def init(self) -> Delta:
        return Delta.source()

    def look(self, state, frames, passed) -> int:
        return 1

    def step(self, state, seen) -> Step:
        raise self.error

    def delta(self, state) -> Delta:
        return state


def test_an_answer_leaves_before_anything_was_learned_from_it(made, tiny_frames):
    loop = made(guards=False)  # guards would let the first ports take force later
    plain = loop.predictor.answer(dark(tiny_frames[:8])).logits
    reply = loop.answer(dark(tiny_frames[:8]))
    assert np.array_equal(reply.logits, plain)
    assert reply.looked and loop.waiting == 1 and loop.predictor.version == 0
    while loop.work():
        pass
    assert loop.predictor.version > 0
    assert not np.array_equal(loop.answer(dark(tiny_frames[:8])).logits, plain)


def test_a_full_mailbox_sheds_looks_and_answers_all_the_same(made, tiny_frames):
    loop = made(queue=2)
    replies = [loop.answer(tiny_frames[start : start + 4]) for start in range(0, 40, 4)]
    assert loop.waiting == 2
    assert loop.counts["shed"] == 8
    assert all(len(reply.logits) == 4 for reply in replies)


def test_without_budget_nothing_is_looked_at(made, tiny_frames):
    loop = made(limits=Limits(learn_ms_per_s=1e-9))
    loop.budget.spend(1.0)
    assert loop.answer(tiny_frames[:4]).looked == 0
    assert loop.counts["shed"] == 1


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("any"), FloatingPointError("nan")])
def test_learning_that_fails_leaves_the_answers_alone_and_is_switched_off(made, tiny_frames, error):
    loop = made(method=Broken(error))
    for _ in range(5):
        reply = loop.answer(tiny_frames[:4])
        assert len(reply.logits) == 4
        while loop.work():
            pass
    assert loop.learned.frozen and loop.predictor.version == 0
    assert loop.events[0] == f"learning failed: {type(error).__name__}: {error}"
    assert loop.events[-1] == "learning is off: 3 steps in a row failed"


@pytest.mark.parametrize("guards", [False, True])
@pytest.mark.parametrize("name", ["moments", "auto", "tent", "cotta", "moments+lame"])
def test_a_threaded_run_can_be_done_again_bit_for_bit(made, tiny_frames, name, guards):
    """R9. The learner is faster or slower as it likes; what was recorded of the order of things is enough."""
    loop = made(name, queue=2, guards=guards)
    stop = threading.Event()

    def learn() -> None:
        while not stop.is_set():
            loop.work(0.01)

    learner = threading.Thread(target=learn)
    learner.start()
    rng = np.random.default_rng(3)
    batches = [dark(tiny_frames[rng.integers(0, 128, 8)]) for _ in range(60)]
    replies = []
    wished = {}
    for number, batch in enumerate(batches):
        replies.append(loop.answer(batch))
        deadline = time.monotonic() + 30
        while number % 8 == 0 and loop.waiting and time.monotonic() < deadline:
            time.sleep(0.001)  # now and then the learner catches up, however slow it is
        if number == 30:
            granted = loop.ask(start_again(loop)).result(timeout=30)
            wished[granted.done] = start_again
    stop.set()
    learner.join()
    again = made(name, ScriptedLoop, queue=2, guards=guards)
    again.wishes = {number: wish(again) for number, wish in wished.items()}
    for batch, reply in zip(batches, replies, strict=True):
        assert np.array_equal(again.play(batch, reply).logits, reply.logits)
    # Guards keep the first ports in the shadow, for as long as the learner takes.
    assert guards or len({reply.version for reply in replies}) > 3


def start_again(loop):
    return lambda learned: replace(learned, state=loop.method.init())


def test_a_record_of_another_run_is_refused(made, tiny_frames):
    loop = made("moments", ScriptedLoop)
    recorded = replace(made("moments").answer(tiny_frames[:4]), done=7)
    with pytest.raises(StateError, match="the record tells of"):
        loop.play(tiny_frames[:4], recorded)


def test_modes_that_only_watch_answer_from_source_and_learn(made, tiny_frames):
    loop = made(begin=None)
    loop.ask(lambda learned: replace(learned, may_answer=()))
    for start in range(0, 64, 8):
        reply = loop.answer(dark(tiny_frames[start : start + 8]))
        assert reply.version == 0
        while loop.work():
            pass
    assert loop.shadow.looks > 0 and 0 <= loop.shadow.agreement <= 1
    learned = loop.ask(lambda learned: replace(learned, may_answer=("own",)))
    loop.work()
    assert loop.wanted(learned.result()) and loop.predictor.version > 0


def test_a_wish_that_fails_changes_nothing(made):
    loop = made()
    before = loop.learned.state

    def wrong(learned: Learned) -> Learned:
        raise ConfigError("no such slot", remedy="use A")

    asked = loop.ask(wrong)
    loop.work()
    with pytest.raises(ConfigError, match="no such slot"):
        asked.result()
    assert loop.learned.state is before


def given(loop, delta: Delta, looks: int = 6):
    bundle = loop.predictor.bundle
    return lambda learned: replace(
        learned, given=delta, slot=GIVEN, probation=Probation(bundle, looks, fallback=learned.slot)
    )


def channels(loop) -> int:
    return loop.predictor.bundle.channels


def play(loop, frames, count: int) -> None:
    for start in range(count):
        loop.answer(frames[start * 8 % 120 : start * 8 % 120 + 8])
        while loop.work():
            pass


def test_an_adapter_that_does_harm_is_rolled_back_within_its_probation(made, tiny_frames):
    """R6."""
    loop = made()
    rng = np.random.default_rng(0)
    harmful = Delta.of_ports(rng.uniform(0.2, 4, channels(loop)), rng.normal(0, 3, channels(loop)))
    loop.ask(given(loop, harmful))
    loop.work()
    assert loop.predictor.delta is harmful
    play(loop, tiny_frames, 6)
    assert loop.learned.slot == "own" and loop.learned.given is None
    assert any(event.startswith("rollback: adapter on probation") for event in loop.events)


def test_an_adapter_that_does_none_is_trusted(made, tiny_frames):
    loop = made()
    gentle = Delta.of_ports(np.full(channels(loop), 1.01), np.full(channels(loop), 0.01))
    loop.ask(given(loop, gentle))
    loop.work()
    play(loop, tiny_frames, 8)
    assert loop.learned.slot == GIVEN and loop.learned.probation is None
    assert "adapter: probation passed" in loop.events
    loop.ask(lambda learned: replace(learned, slot=SOURCE))
    loop.work()
    assert not loop.predictor.delta


def test_a_method_that_answers_itself_is_refused(made):
    method = Broken(ValueError())
    method.answers = True
    with pytest.raises(ConfigError, match="gives the answers itself"):
        made(method=method)


def test_a_stopped_loop_grants_no_wish(made):
    loop = made()
    waiting = loop.ask(lambda learned: learned)
    loop.close()
    for asked in (waiting, loop.ask(lambda learned: learned)):
        with pytest.raises(ConfigError, match="stopping"):
            asked.result()
