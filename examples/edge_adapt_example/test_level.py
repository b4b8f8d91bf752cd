"""The example's own test: what `level` does that the contract cannot know. Run `pytest` here after `pip install .`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from edge_adapt_example.level import Level

from edge_adapt.errors import ConfigError
from edge_adapt.methods.protocol import Answered, Context


def made(**settings) -> Level:
    return Level(Context(SimpleNamespace(manifest=SimpleNamespace(outputs=3)), lambda: None, 0, settings))


def test_what_is_said_all_along_is_said_less():
    method = made()
    state, always = method.init(), np.tile(np.array([1.2, 1.0, 0.0], np.float32), (16, 1))
    first = method.watch(state, Answered(always))
    assert np.allclose(first.logits - first.logits[:, :1], always - always[:, :1], atol=1e-6)  # nothing was said yet
    for _ in range(40):
        state = method.watch(state, Answered(always)).state
    last = method.watch(state, Answered(always)).logits[0]
    assert last[0] - last[1] == pytest.approx(0.1, abs=1e-3)  # half of what it was: the strength


def test_answers_that_are_not_finite_teach_it_nothing():
    method = made()
    step = method.watch(method.init(), Answered(np.full((2, 3), np.nan, np.float32)))
    assert np.array_equal(step.state.mean, method.init().mean)
    assert step.logits is None


def test_a_strength_above_one_is_refused():
    with pytest.raises(ConfigError, match=r"level\.strength is 2"):
        made(strength=2.0)
