"""Brokers, devices and observers for the tests of the agent."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from brokers import device, iotcore_broker, mosquitto, observer, proxy

__all__ = ["broker", "device", "iotcore_broker", "mosquitto", "observer", "proxy"]


@pytest.fixture(params=["iotcore", "mosquitto"])
def broker(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """Each broker in turn: `host`, `port` for MQTT 5, `port_311`."""
    if request.param == "iotcore":
        child = request.getfixturevalue("iotcore_broker")
        yield SimpleNamespace(host=child.host, port=child.port, port_311=child.port_311, kind="iotcore")
    else:
        child = request.getfixturevalue("mosquitto")()
        yield SimpleNamespace(host=child.host, port=child.port, port_311=child.port, kind="mosquitto")
