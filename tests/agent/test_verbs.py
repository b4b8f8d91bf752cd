"""The table of verbs: what each takes, what it refuses, and that it can be published."""

from __future__ import annotations

import json
from typing import Any

import pytest
from command_bench import ARGUMENTS, SHA
from spent import spending

from device_agents.board import SLOTS
from device_agents.verbs import VERBS, catalogue, verb
from edge_adapt.errors import ConfigError


def test_what_is_restored_has_the_names_that_the_board_shows():
    choices = catalogue()["restore"]["arguments"]["properties"]["slot"]["enum"]
    assert tuple(choices) == SLOTS


def test_every_verb_of_the_design_is_there():
    assert set(VERBS) == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_sound_arguments_arrive_as_they_were_sent(name):
    assert verb(name).parse(ARGUMENTS[name]).model_dump() == ARGUMENTS[name]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_verb_takes_an_argument_that_it_does_not_know(name):
    with pytest.raises(ConfigError, match="'frobnicate' is no argument"):
        verb(name).parse({**ARGUMENTS[name], "frobnicate": 1})


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("freeze", {}, "`on` is missing"),
        ("freeze", {"on": "true"}, "`on`.*got 'true'"),
        ("freeze", {"on": 1}, "`on`"),
        ("freeze", {"onn": True}, "did you mean on"),
        ("set-mode", {"mode": "auto"}, "bounded_auto"),
        ("restore", {"slot": "../A"}, "`slot`"),
        ("restore", {"slot": "A"}, "'source', 'own' or 'adapter'"),
        ("set-config", {"config": {"budgt.learn_ms_per_s": 1}}, "did you mean budget.learn_ms_per_s"),
        ("set-config", {"config": {"mqtt.host": "evil"}}, "no live field"),
        ("set-config", {"config": {"budget.queue": 3}}, "no live field"),
        ("set-config", {"config": {"mode": ["shadow"]}}, "a list of 1"),
        ("set-config", {"config": {"mode": "x" * 300}}, "expected a number, a short text"),
        ("set-config", {"config": {}}, "at least 1"),
        ("set-config", {"config": {f"a{i}": 1 for i in range(40)}}, "at most 32"),
        ("load-adapter", {"sha256": SHA}, "one of `url`, `file` and `transfer`"),
        ("load-adapter", {"file": "a", "url": "https://x/y", "sha256": SHA}, "one of"),
        ("load-adapter", {"file": "../../etc/passwd", "sha256": SHA}, "`file`"),
        ("load-adapter", {"file": "/etc/passwd", "sha256": SHA}, "`file`"),
        ("load-adapter", {"file": "a\n", "sha256": SHA}, "`file`"),
        ("load-adapter", {"transfer": "..", "sha256": SHA}, "`transfer`"),
        ("load-adapter", {"url": "file:///etc/passwd", "sha256": SHA}, "`url`"),
        ("load-adapter", {"url": "https://x/a b", "sha256": SHA}, "`url`"),
        ("load-adapter", {"file": "a", "sha256": "0" * 63}, "`sha256`"),
        ("record", {"on": True, "seconds": float("inf")}, "`seconds`"),
        ("record", {"on": True, "seconds": -1}, "`seconds`"),
        ("label-reveal", {"labels": [[1, True]]}, "labels.0.1"),
        ("label-reveal", {"labels": [[1]]}, "labels.0"),
        ("label-reveal", {"labels": [[1, -1]]}, "labels.0.1"),
        ("label-reveal", {"labels": [[1, 1]] * 1025}, "at most 1024"),
        ("log-level", {"level": "loud"}, "`level`"),
    ],
)
def test_wrong_arguments_are_named(name: str, arguments: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says) as caught:
        verb(name).parse(arguments)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isascii()


def test_an_unknown_verb_is_met_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean snapshot"):
        verb("snapshto")


def test_what_is_dangerous_needs_a_reason_and_the_way_back_to_safety_does_not():
    def needs(name: str, arguments: dict[str, Any]) -> bool:
        return verb(name).needs_reason(verb(name).parse(arguments))

    assert needs("reset", {})
    assert needs("load-adapter", {"file": "a", "sha256": SHA})
    assert needs("set-mode", {"mode": "bounded_auto"})
    assert not needs("set-mode", {"mode": "shadow"})
    assert needs("set-config", {"config": {"mode": "bounded_auto"}})  # no way around set-mode
    assert not needs("set-config", {"config": {"mode": "bounded_auto"}, "dry_run": True})
    assert not needs("set-config", {"config": {"log_level": "debug"}})
    assert not needs("freeze", {"on": True})


def test_the_catalogue_fits_into_a_birth_document_and_describes_every_argument():
    told = json.loads(json.dumps(catalogue()))
    assert set(told) == set(VERBS)
    assert len(json.dumps(told, separators=(",", ":"))) < 6_000
    for name, arguments in ARGUMENTS.items():
        assert set(told[name]["arguments"].get("properties", {})) == set(arguments)
    assert told["reset"]["danger"] and not told["ping"]["danger"]
    assert told["snapshot"]["heavy"] and not told["freeze"]["heavy"]


@pytest.mark.parametrize(
    "hostile",
    [
        {f"field{i}": i for i in range(2_000)},
        {"labels": [["x"] * 2 for _ in range(4_000)]},
        {"config": {f"budget.learn_ms_per_{i}": i for i in range(2_000)}},
        {"config": {"a" * 10_000: 1}},
        {"\ud800": 1, "labels": "\udfff" * 5_000},
    ],
)
@pytest.mark.parametrize("name", ["ping", "label-reveal", "set-config"])
def test_refusing_is_cheap_and_its_text_short(name, hostile):
    with spending() as spent, pytest.raises(ConfigError) as caught:
        verb(name).parse(hostile)
    assert spent.cpu_s < 0.05
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isascii()
