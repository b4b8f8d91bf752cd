"""The agent as a device in Home Assistant: one retained document that announces all of its entities. Pure.

Publish it retained, and again whenever `homeassistant/status` says `online`; publish an empty payload to take it back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from device_agents.board import SLOTS, State
from device_agents.settings import AgentSettings
from device_agents.topics import Topics

PREFIX = "homeassistant"
STATUS_TOPIC = f"{PREFIX}/status"
MISSED = 3
"""A figure that was not told so many times in a row is unknown."""
STATES: tuple[State, ...] = ("init", "ready", "degraded", "safe", "draining")
MODES = ("shadow", "recommend", "bounded_auto")
GONE = "['offline', 'lost']"


def discovery(
    settings: AgentSettings, topics: Topics, *, version: str, address: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Topic and payload.

    Args:
        version: of edge-adapt.
        address: of the local page, for a link; only where others can reach it.
    """
    node = node_id(settings.site, settings.device)
    device = {
        "identifiers": [node],
        "name": settings.device,
        "manufacturer": "edge-adapt",
        "model": "adapting classifier",
        "sw_version": version,
        "suggested_area": settings.site,
    }
    if address is not None:
        device["configuration_url"] = address
    payload = {
        "device": device,
        "origin": {"name": "edge-adapt", "sw_version": version},
        "components": {key: {"unique_id": f"{node}_{key}", **facts} for key, facts in _components(settings, topics)},
        "availability": [
            {
                "topic": topics.state,
                "value_template": f"{{{{ 'offline' if value_json.d.s in {GONE} else 'online' }}}}",
            }
        ],
        "qos": 1,
    }
    return discovery_topic(settings.site, settings.device), payload


def discovery_topic(site: str, device: str) -> str:
    """Where a device announces itself."""
    return f"{PREFIX}/device/{node_id(site, device)}/config"


def node_id(site: str, device: str) -> str:
    """Id of the device: letters, digits, `_` and `-` only, which is what Home Assistant takes.

    A dot becomes `-2E`, and a hyphen is doubled, so that two devices never get one id.
    """
    parts = (re.sub(r"-", "--", part).replace(".", "-2E") for part in (site, device))
    return "ea_" + "-_".join(parts)


def _components(settings: AgentSettings, topics: Topics) -> Iterator[tuple[str, dict[str, Any]]]:
    expire = int(MISSED * settings.telemetry.interval_s) + 1

    def figure(group: str, name: str, field: str, **facts: Any) -> dict[str, Any]:
        return {
            "platform": "sensor",
            "name": name,
            "state_topic": topics.tele(group),
            "value_template": f"{{{{ value_json.d.{field} | default(none) }}}}",
            "state_class": "measurement",
            "expire_after": expire,
            **facts,
        }

    yield (
        "state",
        {
            "platform": "sensor",
            "name": "State",
            "state_topic": topics.state,
            "value_template": "{{ value_json.d.s }}",
            "json_attributes_topic": topics.state,
            "json_attributes_template": "{{ {'why': value_json.d.why | default([])} | tojson }}",
            "device_class": "enum",
            "options": [*STATES, "offline", "lost"],
            "icon": "mdi:heart-pulse",
        },
    )
    yield "mode", _enum(topics, "Mode", "mode", MODES, expire)
    yield "slot", _enum(topics, "Adapter", "slot", SLOTS, expire)
    yield (
        "learning",
        {
            "platform": "binary_sensor",
            "name": "Learning",
            "state_topic": topics.tele("adapt"),
            "value_template": "{{ 'OFF' if value_json.d.frozen else 'ON' }}",
            "expire_after": expire,
            "device_class": "running",
        },
    )
    yield "fps", figure("perf", "Frames per second", "fps", unit_of_measurement="1/s", icon="mdi:speedometer")
    yield "p99", figure("perf", "Latency p99", "latency_p99_ms", unit_of_measurement="ms", icon="mdi:timer-outline")
    yield "ood", figure("ood", "Strange frames", "share", **_per_cent("share", "value_json.d.share * 100"))
    yield (
        "accuracy",
        figure("ood", "Estimated accuracy", "estimate", **_per_cent("estimate", "value_json.d.estimate.value"))
        | {
            "json_attributes_topic": topics.tele("ood"),
            "json_attributes_template": "{{ (value_json.d.estimate or {}) | tojson }}",
        },
    )
    yield (
        "learn_ms",
        figure("adapt", "Learning per second", "ms_per_s", unit_of_measurement="ms/s", icon="mdi:school-outline"),
    )
    yield (
        "temperature",
        figure("host", "Temperature", "temperature_c", unit_of_measurement="°C", device_class="temperature"),
    )


def _enum(topics: Topics, name: str, field: str, options: tuple[str, ...], expire: int) -> dict[str, Any]:
    return {
        "platform": "sensor",
        "name": name,
        "state_topic": topics.tele("adapt"),
        "value_template": f"{{{{ value_json.d.{field} }}}}",
        "device_class": "enum",
        "options": list(options),
        "expire_after": expire,
    }


def _per_cent(field: str, value: str) -> Mapping[str, Any]:
    """A figure that may be not known yet: `None` is what Home Assistant shows as unknown."""
    return {
        "value_template": f"{{{{ ({value}) | round(1) if value_json.d.{field} is not none else none }}}}",
        "unit_of_measurement": "%",
    }
