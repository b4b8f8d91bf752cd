"""The announcement to Home Assistant, and that its templates find what the agent tells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from device_agents.board import State, Status
from device_agents.homeassistant import discovery, node_id
from device_agents.settings import AgentSettings, Mode, SourceSettings, TelemetrySettings
from device_agents.telling import telemetry
from device_agents.topics import Topics

TOPICS = Topics("ea/v1", "plant-3", "cam.7")
STATUS = Status(
    state="degraded",
    mode="bounded_auto",
    slot="own",
    fps=14.9,
    latency_ms={"p50": 20.0, "p95": 25.0, "p99": 31.5},
    learn={"ms_per_s": 120.0, "allowed_ms_per_s": 250.0},
    ood=0.034,
    estimate={"value": 91.44, "low": 88.0, "high": 94.0},
    host={"temperature_c": 58.5},
)


def settings(**facts: Any) -> AgentSettings:
    known = {"site": "plant-3", "device": "cam.7", "bundle": Path("bundle"), "source": SourceSettings(kind="camera")}
    return AgentSettings(**(known | facts))


def rendered(template: str, message: dict[str, Any]) -> str:
    """What Home Assistant makes of a message."""
    jinja2 = pytest.importorskip("jinja2")
    return str(jinja2.Environment(autoescape=False).from_string(template).render(value_json=message))


def values(status: Status) -> dict[str, str]:
    """Entity -> what it shows."""
    payload = discovery(settings(), TOPICS, version="0.1.0")[1]
    messages = {TOPICS.tele(group): telemetry(group, status) for group in ("perf", "adapt", "ood", "host")}
    messages[TOPICS.state] = {"s": status.state, "boot": "b", "why": list(status.why)}
    return {
        key: rendered(entity["value_template"], {"v": 1, "d": messages[entity["state_topic"]]})
        for key, entity in payload["components"].items()
    }


def test_one_document_holds_what_home_assistant_requires() -> None:
    topic, payload = discovery(settings(), TOPICS, version="0.1.0")
    assert re.fullmatch(r"homeassistant/device/[A-Za-z0-9_-]+/config", topic)
    assert payload["origin"]["name"] == "edge-adapt"
    assert payload["device"]["identifiers"]
    entities = payload["components"]
    assert {"state", "mode", "fps", "p99", "ood", "accuracy", "learning"} <= entities.keys()
    assert len({entity["unique_id"] for entity in entities.values()}) == len(entities)
    for entity in entities.values():
        assert entity["platform"] in ("sensor", "binary_sensor")
        assert entity["name"]
        assert entity["state_topic"].startswith("ea/v1/plant-3/cam.7/")
    assert len(json.dumps(payload)) < 15_000  # fits the smallest limit that the agent is given by default


def test_every_entity_shows_what_the_agent_tells() -> None:
    assert values(STATUS) == {
        "state": "degraded",
        "mode": "bounded_auto",
        "slot": "own",
        "learning": "ON",
        "fps": "14.9",
        "p99": "31.5",
        "ood": "3.4",
        "accuracy": "91.4",
        "learn_ms": "120.0",
        "temperature": "58.5",
    }


def test_what_is_not_known_is_shown_as_unknown_and_not_as_a_figure() -> None:
    shown = values(Status(frozen=True))
    assert {shown[key] for key in ("fps", "p99", "ood", "accuracy", "learn_ms", "temperature")} == {"None"}
    assert shown["learning"] == "OFF"


def test_lists_of_values_are_complete() -> None:
    entities = discovery(settings(), TOPICS, version="0.1.0")[1]["components"]
    assert set(entities["state"]["options"]) == {*get_args(State), "lost"}
    assert set(entities["mode"]["options"]) == set(get_args(Mode))


def test_figures_expire_when_they_are_not_told_any_more_and_the_state_does_not() -> None:
    telemetry_settings = TelemetrySettings(interval_s=20)
    entities = discovery(settings(telemetry=telemetry_settings), TOPICS, version="0.1.0")[1]["components"]
    assert entities["fps"]["expire_after"] == 61
    assert "expire_after" not in entities["state"]  # retained; the will of the broker ends it


@pytest.mark.parametrize(
    ("state", "shown"), [("ready", "online"), ("safe", "online"), ("lost", "offline"), ("offline", "offline")]
)
def test_the_will_makes_the_device_unavailable(state: str, shown: str) -> None:
    [availability] = discovery(settings(), TOPICS, version="0.1.0")[1]["availability"]
    assert availability["topic"] == TOPICS.state
    assert rendered(availability["value_template"], {"d": {"s": state}}) == shown


def test_two_devices_never_share_an_id() -> None:
    pairs = [
        ("a-b", "c"),
        ("a", "b-c"),
        ("a_b", "c"),
        ("a", "b_c"),
        ("a.b", "c"),
        ("a-2Eb", "c"),
        ("a-", "b"),
        ("a", "b"),
    ]
    ids = [node_id(site, device) for site, device in pairs]
    assert len(set(ids)) == len(pairs)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", id) for id in ids)


def test_a_page_that_others_reach_is_linked() -> None:
    assert "configuration_url" not in discovery(settings(), TOPICS, version="1")[1]["device"]
    linked = discovery(settings(), TOPICS, version="1", address="http://cam:8765")[1]
    assert linked["device"]["configuration_url"] == "http://cam:8765"
