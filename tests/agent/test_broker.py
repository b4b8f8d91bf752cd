"""The embedded broker: loopback, both protocols, no child left behind."""

from __future__ import annotations

import builtins
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from brokers import wait_until

from device_agents.broker import EmbeddedBroker, broker_toml, free_port
from edge_adapt.errors import ConfigError, EngineError


def listens(port, host="127.0.0.1"):
    try:
        socket.create_connection((host, port), 0.3).close()
    except OSError:
        return False
    return True


def test_it_listens_on_loopback_alone_and_frees_its_ports():
    pytest.importorskip("iotcore")
    with EmbeddedBroker(port_311=0) as broker:
        assert listens(broker.port) and broker.port_311 is not None and listens(broker.port_311)
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        bound = [row[1].split(":")[0] for row in rows if row[1].endswith(f":{broker.port:04X}") and row[3] == "0A"]
        assert bound == ["0100007F"]
    assert not listens(broker.port)
    broker.stop()


def test_a_port_in_use_is_told():
    pytest.importorskip("iotcore")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=str(port)):
            EmbeddedBroker(port).start()


def test_it_ends_with_a_parent_that_was_killed():
    pytest.importorskip("iotcore")
    port = free_port()
    code = f"import time; from device_agents.broker import EmbeddedBroker as B; B({port}).start(); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: listens(port), 20)
    parent.kill()
    parent.wait()
    wait_until(lambda: not listens(port))


def test_without_iotcore_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "iotcore":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"edge-adapt\[demo\]"):
        EmbeddedBroker().start()


def test_its_configuration_has_a_listener_for_mqtt_5_and_none_beyond_loopback():
    text = broker_toml(1883, 1884, 65_536)
    assert "[v5.1]" in text and "[v4.1]" in text and "0.0.0.0" not in text
    assert "[v4.1]" not in broker_toml(1883, None, 65_536)
