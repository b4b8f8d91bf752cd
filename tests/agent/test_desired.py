"""The shadow: documents that are applied whole or not at all, and what is reported back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_bench import TOPICS

from device_agents.desired import Desired
from device_agents.live import NEEDS_RESTART, flat, live_fields, merged
from device_agents.mqtt import Incoming
from device_agents.settings import AgentSettings
from edge_adapt.errors import ConfigError, StateError

FILE = AgentSettings.model_validate({"bundle": "b", "source": {"kind": "camera"}, "budget": {"learn_ms_per_s": 200.0}})


class Applied(list[AgentSettings]):
    """Settings that were put in force; `refuse` makes the next one fail."""

    refuse = False

    def __call__(self, settings: AgentSettings) -> None:
        if self.refuse:
            raise StateError("no memory for that", remedy="ask for less")
        self.append(settings)


@pytest.fixture
def applied() -> Applied:
    return Applied()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "desired.json"


@pytest.fixture
def desired(applied: Applied, path: Path) -> Desired:
    return Desired(FILE, applied, path=path)


def rejected(desired: Desired) -> dict[str, str]:
    return {one["field"]: one["why"] for one in desired.reported(slots={}, versions={})["rejected"]}


def test_live_fields_are_those_that_the_settings_mark():
    fields = live_fields(AgentSettings)
    assert {"mode", "log_level", "budget.learn_ms_per_s", "snapshots.every_s", "telemetry.interval_s"} <= fields
    assert not {"budget.queue", "telemetry.home_assistant", "mqtt.host", "bundle", "site"} & fields


def test_a_document_is_applied_and_reported(desired, applied):
    outcome = desired.take({"ver": 3, "config": {"budget": {"learn_ms_per_s": 50}, "mode": "bounded_auto"}})
    assert outcome.applied and outcome.rejected == ()
    assert {str(one) for one in outcome.changes} == {
        "budget.learn_ms_per_s: 200.0 -> 50.0 (now)",
        "mode: shadow -> bounded_auto (now)",
    }
    assert applied == [desired.settings]
    assert (desired.settings.budget.learn_ms_per_s, desired.settings.mode) == (50.0, "bounded_auto")
    told = json.loads(json.dumps(desired.reported(slots={"A": 3}, versions={"agent": "0.1"})))
    assert (told["ver"], told["applied_desired_ver"]) == (1, 3)
    assert told["config"]["budget"]["learn_ms_per_s"] == 50
    assert (told["slots"], told["versions"], told["rejected"]) == ({"A": 3}, {"agent": "0.1"}, [])
    assert len(json.dumps(told)) < 8_000


def test_dotted_names_say_the_same(desired):
    desired.take({"ver": 1, "config": {"telemetry.interval_s": 5, "snapshots": {"every_s": 9}}})
    assert desired.settings.telemetry.interval_s == 5
    assert desired.settings.snapshots.every_s == 9


@pytest.mark.parametrize("version", [2, 3])
def test_an_old_version_changes_nothing(desired, applied, version):
    desired.take({"ver": 3, "config": {"mode": "recommend"}})
    outcome = desired.take({"ver": version, "config": {"mode": "bounded_auto"}})
    assert not outcome.applied
    assert "not newer than 3" in outcome.text
    assert desired.settings.mode == "recommend"
    assert len(applied) == 1


def test_a_field_that_a_later_version_leaves_out_falls_back_to_the_file(desired):
    desired.take({"ver": 1, "config": {"budget": {"learn_ms_per_s": 50}, "mode": "recommend"}})
    desired.take({"ver": 2, "config": {"mode": "recommend"}})
    assert desired.settings.budget.learn_ms_per_s == 200
    assert desired.settings.mode == "recommend"


def test_a_field_that_needs_a_restart_is_left_out_and_told(desired):
    config = {"mode": "recommend", "mqtt": {"host": "evil"}, "budget": {"queue": 99}, "method": {"settings": {"lr": 1}}}
    outcome = desired.take({"ver": 1, "config": config})
    assert outcome.applied
    assert desired.settings.mode == "recommend"
    assert (desired.settings.mqtt, desired.settings.budget.queue) == (None, 4)
    assert rejected(desired) == dict.fromkeys(("mqtt.host", "budget.queue", "method.settings.lr"), NEEDS_RESTART)


def test_a_field_that_needs_a_restart_but_says_what_is_so_already_is_no_complaint(desired):
    assert desired.take({"ver": 1, "config": {"budget": {"queue": 4}, "site": "site"}}).rejected == ()


@pytest.mark.parametrize(
    ("config", "field", "says"),
    [
        ({"mod": "shadow"}, "mod", "did you mean mode"),
        ({"mode": "auto"}, "mode", "bounded_auto"),
        ({"mode": None}, "mode", "got None"),
        ({"budget": {"learn_ms_per_s": "50"}}, "budget.learn_ms_per_s", "valid number"),
        ({"budget": {"learn_ms_per_s": -1}}, "budget.learn_ms_per_s", "greater than 0"),
        ({"budget": {"learn_ms_per_s": True}}, "budget.learn_ms_per_s", "valid number"),
        ({"budget": {"learn_ms_per_s": {"x": 1}}}, "budget.learn_ms_per_s.x", "is no setting"),
        ({"budget": 5}, "budget", "is no setting"),
        ({"snapshots": {"probation_batches": 1.5}}, "snapshots.probation_batches", "integer"),
        ({"__class__": {"__init__": 1}}, "__class__.__init__", "is no setting"),
        ({"model_config": 1}, "model_config", "is no setting"),
    ],
)
def test_what_is_wrong_refuses_the_whole_and_is_named(desired, applied, config, field, says):
    outcome = desired.take({"ver": 1, "config": {"log_level": "debug", **config}})
    assert not outcome.applied and applied == []
    assert desired.applied_version == 0
    assert says in rejected(desired)[field]
    assert desired.settings == FILE
    desired.take({"ver": 1, "config": {"log_level": "debug"}})
    assert rejected(desired) == {}, "a good one clears the complaint"


@pytest.mark.parametrize(
    "document",
    [None, [], "x", {}, *({"ver": ver} for ver in ("1", True, -1, 1.5, 2**60)), {"ver": 1, "config": []}],
)
def test_what_is_no_document_changes_nothing(desired, applied, document):
    assert not desired.take(document).applied
    assert applied == [] and desired.applied_version == 0
    assert rejected(desired)


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b'{"v":1}', b'{"v":2,"d":{"ver":1}}', b"x" * 20_000])
def test_what_cannot_be_read_changes_nothing(desired, applied, payload):
    outcome = desired.receive(Incoming(TOPICS.desired, payload, retain=True), limit=16_384)
    assert not outcome.applied and outcome.text
    assert applied == []


def test_a_document_comes_retained(desired):
    payload = json.dumps({"v": 1, "d": {"ver": 1, "config": {"mode": "recommend"}}}).encode()
    assert desired.receive(Incoming(TOPICS.desired, payload, retain=True), limit=16_384).applied
    assert desired.settings.mode == "recommend"


def test_what_cannot_be_put_in_force_is_told_and_may_be_tried_again(desired, applied):
    applied.refuse = True
    assert not desired.take({"ver": 1, "config": {"mode": "recommend"}}).applied
    assert desired.settings == FILE
    assert "no memory" in rejected(desired)["config"]
    applied.refuse = False
    assert desired.take({"ver": 1, "config": {"mode": "recommend"}}).applied


def test_a_restart_keeps_the_document(desired, applied, path):
    desired.take({"ver": 7, "config": {"mode": "recommend", "mqtt": {"host": "x"}}})
    again = Desired(FILE, applied, path=path)
    assert (again.applied_version, again.settings.mode, again.trouble) == (7, "recommend", None)
    assert not again.take({"ver": 7, "config": {"mode": "shadow"}}).applied
    assert again.reported(slots={}, versions={})["ver"] == 1
    assert len(applied) == 1, "what is in force from the beginning is read, not applied"


@pytest.mark.parametrize("data", [b"", b"{", b"\x00" * 100, b"[1]", b'{"ver":"7"}', b"\xff\xfe"])
def test_a_damaged_file_is_set_aside(applied, path, data):
    path.write_bytes(data)
    desired = Desired(FILE, applied, path=path)
    assert (desired.applied_version, desired.settings) == (0, FILE)
    assert "set aside" in desired.trouble
    assert path.with_name("desired.json.bad").read_bytes() == data
    assert desired.take({"ver": 1, "config": {}}).applied
    assert desired.trouble is None


@pytest.mark.parametrize("config", [{"mode": "warp"}, {"gone.field": 1}, {"mode.x": 1}, {"mqtt.host": "x"}])
def test_a_saved_document_that_does_not_fit_any_more_is_left_out(applied, path, config):
    path.write_text(json.dumps({"ver": 3, "config": config}))
    desired = Desired(FILE, applied, path=path)
    assert (desired.applied_version, desired.settings) == (0, FILE)
    assert "does not fit" in desired.trouble


def test_a_disk_that_fails_keeps_nothing_from_being_in_force(applied, tmp_path):
    desired = Desired(FILE, applied, path=tmp_path / "absent" / "desired.json")
    assert desired.take({"ver": 1, "config": {"mode": "recommend"}}).applied
    assert desired.settings.mode == "recommend"
    assert "cannot be written" in desired.trouble


def test_a_command_changes_what_no_document_owns_until_the_restart(desired, applied, path):
    desired.take({"ver": 1, "config": {"mode": "recommend"}})
    (change,) = desired.set({"log_level": "debug"})
    assert (change.path, change.new) == ("log_level", "debug")
    assert (desired.settings.mode, desired.settings.log_level) == ("recommend", "debug")
    with pytest.raises(ConfigError, match="mode is set by version 1 of the desired document"):
        desired.set({"mode": "shadow"})
    assert Desired(FILE, applied, path=path).settings.log_level == "info"


def test_a_dry_run_tells_and_changes_nothing(desired, applied):
    (change,) = desired.set({"budget.learn_ms_per_s": 9}, dry_run=True)
    assert (change.old, change.new) == (200, 9)
    assert desired.settings == FILE and applied == []


@pytest.mark.parametrize("config", [{"mode": "warp"}, {"mqtt.host": "x"}, {"nothing": 1}, {"budget.learn_ms_per_s": 0}])
def test_a_command_that_is_wrong_changes_nothing(desired, applied, config):
    with pytest.raises(ConfigError, match=next(iter(config))):
        desired.set({"log_level": "debug", **config})
    assert desired.settings == FILE and applied == []


def test_a_document_takes_a_field_over_from_a_command(desired):
    desired.set({"log_level": "debug", "budget.learn_ms_per_s": 9})
    desired.take({"ver": 1, "config": {"log_level": "error"}})
    assert (desired.settings.log_level, desired.settings.budget.learn_ms_per_s) == ("error", 9)
    desired.take({"ver": 2, "config": {}})
    assert desired.settings.log_level == "info", "and does not give it back"


def test_a_file_that_was_read_again_lies_under_the_document(desired, applied):
    desired.take({"ver": 1, "config": {"mode": "recommend"}})
    changed: dict[str, Any] = FILE.model_dump()
    changed["budget"] |= {"learn_ms_per_s": 70.0, "queue": 9}
    changed |= {"mode": "bounded_auto", "site": "elsewhere"}
    differences = {one.path: one.live for one in desired.rebase(AgentSettings.model_validate(changed))}
    assert differences == {"mode": True, "budget.learn_ms_per_s": True, "budget.queue": False, "site": False}
    now = desired.settings
    assert (now.mode, now.budget.learn_ms_per_s, now.budget.queue, now.site) == ("recommend", 70, 4, "site")
    desired.take({"ver": 2, "config": {}})
    assert desired.settings.mode == "bounded_auto"


def test_a_file_that_cannot_be_applied_leaves_everything(desired, applied):
    applied.refuse = True
    with pytest.raises(StateError):
        desired.rebase(merged(FILE, {"mode": "recommend"}))
    assert desired.settings == FILE


def test_flat_names():
    assert flat({"a": {"b": {"c": 1}, "d": []}, "e": {}, "f.g": None}) == {"a.b.c": 1, "a.d": [], "f.g": None}
