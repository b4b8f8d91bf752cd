"""What is scored: genuine frames with a label, by domain; visits of what returns; entries that the router told."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.replayed import Row, Visit
from benchmarks.scenarios import Shift
from benchmarks.score import Score
from benchmarks.visits import BLOCK, EARLY, on_return, pooled, settled, visits_of
from edge_adapt.routing.router import ROUTE
from edge_adapt.runtime.loop import Answer


def shift(name: str, labels, domains=None, counts=None) -> Shift:
    given = None if labels is None else np.array(labels)
    frames = np.zeros((4 if labels is None else len(labels), 2, 2, 1), np.uint8)
    return Shift(name, frames, given, domains, counts)


def scored(shifts: list[Shift], answers, size: int = 4, events=()) -> dict:
    """The row of a method that gives these answers, with one set of events a batch."""
    score, done = Score("mine", shifts), 0
    told = dict(enumerate(events))
    batch = 0
    for one in shifts:
        for start in range(0, len(one.images), size):
            count = min(size, len(one.images) - start)
            logits = np.eye(3)[np.array(answers[done : done + count])]
            score.add(count, Answer(logits, 0.1, 0.0, 0, told.get(batch, ())))
            done, batch = done + count, batch + 1
    assert done == score.total
    return score.row({})


def test_foreign_frames_do_not_count():
    genuine = np.array([True, False, True, True, False, True])
    row = scored([shift("fog", [0, -1, 1, 2, -1, 0], counts=genuine)], [0, 0, 1, 0, 1, 0])
    assert row["errors"] == {"fog": 25.0}
    assert row["timeline"] == {"frames": [6], "error": [25.0]}
    assert row["frames"] == 6


def test_foreign_frames_do_not_count_even_with_a_label():
    row = scored([shift("fog", [0, 0, 0, 0], counts=np.array([True, True, True, False]))], [0, 0, 0, 1])
    assert row["errors"] == {"fog": 0.0}


def test_mixed_domains_are_scored_each_in_the_fields_order():
    domains = np.array(["snow", "fog", "snow", "gaussian_noise"])
    row = scored([shift("mixed", [0, 1, 2, 0], domains)], [0, 0, 0, 0])
    assert row["errors"] == {"gaussian_noise": 0.0, "snow": 50.0, "fog": 100.0}
    assert list(row["errors"]) == ["gaussian_noise", "snow", "fog"]
    assert row["error_mean"] == 50.0


def test_a_burst_is_scored_apart_from_its_domain():
    burst = shift("fog burst", [1, 1], np.array(["fog", "fog"]))
    row = scored([shift("fog", [0, 0]), burst, shift("fog", [0, 2])], [0, 0, 1, 0, 0, 0])
    assert row["errors"] == {"fog": 25.0, "fog burst": 50.0}


def test_a_domain_that_returns_has_one_error_and_a_visit_each():
    shifts = [shift("fog", [0] * 100), shift("snow", [0] * 10), shift("fog", [0] * 70)]
    row = scored(shifts, [1] * 50 + [0] * 50 + [0] * 10 + [1] * 7 + [0] * 63, size=30)
    assert row["errors"] == {"fog": round(57 / 170 * 100, 3), "snow": 0.0}
    assert row["visits"] == [
        {"name": "fog", "start": 0, "frames": 100, "error": [pytest.approx(5000 / 64, abs=1e-4), 0.0]},
        {"name": "fog", "start": 110, "frames": 70, "error": [pytest.approx(700 / 64, abs=1e-4), 0.0]},
    ]


def test_a_shift_without_labels_leaves_a_gap_and_moves_nothing():
    row = scored([shift("one", None), shift("two", [0, 1, 2, 0])], [1, 1, 1, 1, 0, 1, 2, 1])
    assert row["errors"] == {"two": 25.0}
    assert row["timeline"]["frames"] == [8]


def test_entries_are_where_the_answering_one_changed():
    events = [("domain change",), (f"{ROUTE}1",), (f"{ROUTE}1", "new domain"), (f"{ROUTE}source", f"{ROUTE}2")]
    row = scored([shift("fog", [0] * 16)], [0] * 16, events=events)
    assert row["entries"] == [
        {"frame": 4, "entry": "1"},
        {"frame": 12, "entry": "source"},
        {"frame": 12, "entry": "2"},
    ]
    assert row["events"] == [{"frame": 0, "name": "domain change"}, {"frame": 8, "name": "new domain"}]


def row_of(*visits: Visit) -> Row:
    return Row(method="mine", error_mean=1.0, errors={}, visits=visits)


def test_arriving_and_settled_errors_count_every_frame_once():
    fog = [
        Visit(name="fog", start=0, frames=160, error=(90.0, 80.0, 70.0)),
        Visit(name="fog", start=500, frames=160, error=(40.0, 20.0, 10.0)),
        Visit(name="fog", start=900, frames=224, error=(20.0, 20.0, 10.0, 40.0)),
    ]
    row = row_of(fog[0], Visit(name="snow", start=300, frames=64, error=(50.0,)), *fog[1:])
    assert visits_of(row, "fog") == fog
    assert EARLY == 2 * BLOCK
    assert on_return(fog) == 25.0
    assert settled(fog) == pytest.approx((32 * 10 + 64 * 10 + 32 * 40) / 128)
    assert pooled(fog[:1], BLOCK) == pytest.approx((64 * 80 + 32 * 70) / 96)


def test_without_later_frames_or_labels_nothing_is_settled():
    assert settled([Visit(name="fog", start=0, frames=64, error=(1.0,))] * 3) is None
    assert on_return([Visit(name="fog", start=0, frames=64, error=(None,))] * 3) is None
    assert on_return([]) is None
