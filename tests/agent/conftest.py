"""Brokers, devices, observers and a bench for the tests of the agent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from brokers import device, iotcore_broker, mosquitto, observer, proxy
from command_bench import Bench

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


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Commands, with what carries them out and a clock that is turned by hand."""
    made = Bench(tmp_path)
    yield made
    made.close()
