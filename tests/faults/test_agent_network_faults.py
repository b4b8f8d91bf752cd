"""Faults of the network, and what the whole agent makes of them: rows 6, 8 to 11, 14, 16, 31, and certificates."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from agents import (
    QUICK,
    ROOT,
    answered,
    child,
    command,
    degraded,
    goes_on,
    mqtt_to,
    ready,
    running,
    settings,
    stream,
    told,
    until,
)
from brokers import mosquitto, observer, proxy
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from pki import Pki

from device_agents import courier
from device_agents.agent import Agent
from device_agents.broker import free_port
from device_agents.package import keygen, pack, private_key
from edge_adapt.delta import Delta

__all__ = ["child", "mosquitto", "observer", "proxy", "running", "settings", "stream"]
PLENTY = {"learn_ms_per_s": 1000.0}


class Nowhere:
    """Nobody listens there, so far."""

    def __init__(self) -> None:
        self.host, self.port = "127.0.0.1", free_port()


@pytest.mark.fault(8)
def test_without_a_broker_it_answers_at_once_and_connects_later(running, mosquitto, observer):
    """R1: the first answer waits for no broker; when there is one, it learns everything that is retained."""
    nowhere = Nowhere()
    agent = running(**mqtt_to(nowhere))
    goes_on(agent)
    assert agent.board.status.state == "ready" and agent.board.status.link == "offline"
    broker = mosquitto(port=nowhere.port)
    until(lambda: agent.board.status.link == "online" and agent.network.courier._sender.idle)
    watcher = observer(broker)
    for topic in ("state", "birth", "reported"):
        until(lambda topic=topic: watcher.of(f"{ROOT}/{topic}", retain=True))
    assert watcher.of(f"{ROOT}/birth")[0]["d"]["bundle"]["id"] == agent.core.bundle.id


@pytest.mark.fault(9)
def test_a_broker_that_dies_and_comes_back_empty_is_told_everything_again(running, mosquitto, observer, proxy):
    """R1, R3: answers go on, what happened meanwhile arrives in order and marked, and all retained values are back."""
    broker = mosquitto()
    gate = proxy(broker)
    agent = running(**mqtt_to(gate))
    until(lambda: agent.board.status.link == "online")
    gate.mode = "refuse"
    broker.kill()
    until(lambda: agent.board.status.link == "offline")
    for n in range(12):
        agent.tell("drift", f"drift {n}")
    goes_on(agent)
    assert agent.board.status.state == "ready", "a broker that is away is no trouble of the device"
    until(lambda: agent.board.status.waiting >= 12)
    broker.start()
    watcher = observer(broker)
    gate.mode = "pass"
    until(lambda: len(watcher.of(f"{ROOT}/event/drift")) >= 12)
    drifts = [each for each in watcher.of(f"{ROOT}/event/drift") if each["d"]["text"].startswith("drift ")]
    assert [each["d"]["text"] for each in drifts] == [f"drift {n}" for n in range(12)]
    assert all(each["hist"] for each in drifts) and [each["seq"] for each in drifts] == sorted(
        each["seq"] for each in drifts
    )
    for topic in ("state", "birth", "reported"):
        until(lambda topic=topic: watcher.of(f"{ROOT}/{topic}"))
    until(lambda: agent.board.status.waiting == 0)


@pytest.mark.fault(10)
def test_a_broker_that_hangs_holds_up_nothing(running, mosquitto, observer):
    """R1, R3: answers go on, commands of buttons are obeyed, and what was told arrives afterwards."""
    broker = mosquitto()
    watcher = observer(broker)
    agent = running(**mqtt_to(broker))
    until(lambda: agent.board.status.link == "online")
    broker.pause()
    agent.tell("drift", "while it hung")
    goes_on(agent, 300)
    assert command(agent, "ping")["status"] == "done"
    until(lambda: agent.board.status.link == "offline")
    broker.resume()
    until(lambda: any("while it hung" in each["d"]["text"] for each in watcher.of(f"{ROOT}/event/drift")))


@pytest.mark.fault(11)
def test_without_any_network_it_answers_and_stops_as_usual(child, tmp_path):
    """R1: no route to anywhere, not even to itself."""
    bare = ("unshare", "-rn")
    if shutil.which("unshare") is None or subprocess.run([*bare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("network namespaces are not available here")
    answers = tmp_path / "answers.jsonl"
    agent = child("--answers", str(answers), before=bare, **mqtt_to(Nowhere()))
    until(answers.exists)
    for _ in range(3):
        size = answers.stat().st_size
        until(lambda size=size: answers.stat().st_size > size, "it answers no more")
        time.sleep(0.5)
        assert agent.running(), agent.text
    agent.signal(signal.SIGTERM)
    assert agent.wait() == 0, agent.text


@pytest.mark.fault(14)
def test_of_two_agents_with_one_name_both_answer_and_one_says_why_it_is_silent(
    running, mosquitto, tmp_path, monkeypatch
):
    """R1, R7: one keeps the session, the other is degraded and goes on answering; no endless fight."""
    broker = mosquitto()
    monkeypatch.setattr(courier, "Pace", lambda: replace(QUICK, backoff_s=(0.5, 2.0)))
    pair = [running(state_dir=tmp_path / name, **mqtt_to(broker)) for name in "ab"]
    silent = until(lambda: [each for each in pair if told(each, "link down") and each.network.troubles])[0]
    degraded(silent, "link: taken-over")
    (other,) = [each for each in pair if each is not silent]
    until(lambda: other.board.status.link == "online")
    time.sleep(1)
    until(lambda: other.board.status.link == "online")
    for each in pair:
        goes_on(each)
        assert each.network.courier.connects <= 5, "three, the last return of the one that stays, and one for chance"
    assert not other.network.troubles


@pytest.mark.fault(16)
def test_a_flood_of_commands_over_mqtt_holds_up_no_answer(running, mosquitto, observer):
    """R1: while thousands come it answers on and obeys few, and afterwards it obeys as before."""
    watcher = observer(broker := mosquitto(), filters=[f"{ROOT}/ack/#"])
    agent = running(**mqtt_to(broker))
    until(lambda: agent.board.status.link == "online")
    properties = Properties(PacketTypes.PUBLISH)
    properties.MessageExpiryInterval = 60

    def ping(key: str) -> None:
        watcher.client.publish(f"{ROOT}/cmd/ping", json.dumps({"v": 1, "id": key}), properties=properties)

    began = time.monotonic()
    for n in range(5000):
        ping(f"flood-{n}")
    goes_on(agent, 200)
    until(lambda: agent.commands.counts["suppressed"] > 0)

    def obeyed() -> bool:
        ping("afterwards")
        time.sleep(0.2)
        return any(each["d"]["status"] == "done" for each in watcher.of(f"{ROOT}/ack/afterwards"))

    until(obeyed)
    limits = agent.commands.limits
    assert agent.commands.counts["accepted"] <= limits.burst + limits.rate * (time.monotonic() - began) + 1
    until(lambda: agent.board.status.state == "ready" and agent.board.status.link == "online")


# Adapters over the air.


class Signer:
    """Whom the device trusts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.private = folder / "key"
        self.public = keygen(self.private)

    def packed(self, delta: Delta, bundle) -> bytes:
        return pack(delta, bundle, private_key(self.private), method="moments", note="a test")


@pytest.fixture
def signer(tmp_path) -> Signer:
    return Signer(tmp_path / "keys")


@pytest.fixture
def offered(running, mosquitto, observer, signer, tmp_path):
    """An agent, an observer, and a function that gives the agent a package by MQTT and returns its answers."""
    broker = mosquitto()
    facts = {"snapshots": {"probation_batches": 24, "every_s": 600.0}, "budget": PLENTY}

    def start() -> Agent:
        agent = running(**mqtt_to(broker, trusted_keys=[signer.public]), **facts)
        until(lambda: agent.board.status.link == "online")
        return agent

    watcher = observer(broker, filters=[f"{ROOT}/#"])

    def load(data: bytes, sha256: str | None = None) -> str:
        inbox = tmp_path / "state/inbox"
        inbox.mkdir(parents=True, exist_ok=True)
        key = f"load-{len(watcher.of(f'{ROOT}/ack/'))}"
        (inbox / f"{key}.eadelta").write_bytes(data)
        arguments = {"file": f"{key}.eadelta", "sha256": sha256 or hashlib.sha256(data).hexdigest()}
        body = {"v": 1, "id": key, "by": "test", "reason": "a test", "expires_ms": soon_ms(), "d": arguments}
        watcher.publish(f"{ROOT}/cmd/load-adapter", json.dumps(body))
        ended = ("done", "failed", "rejected")
        answers = until(lambda: [each for each in watcher.of(f"{ROOT}/ack/{key}") if each["d"]["status"] in ended])
        return f"{answers[0]['d']['status']}: {answers[0]['d'].get('text', '')}"

    return start, load


def soon_ms() -> int:
    """Wall clock, 30 s from now."""
    return int(1000 * (time.time() + 30))


def ports(bundle, *, harmful: bool) -> Delta:
    rng, channels = np.random.default_rng(0), bundle.channels
    if harmful:
        return Delta.of_ports(rng.uniform(0.2, 4, channels), rng.normal(0, 3, channels))
    return Delta.of_ports(np.full(channels, 1.01), np.full(channels, 0.01))


@pytest.mark.fault(31)
def test_an_adapter_that_is_not_signed_or_damaged_is_refused(offered, signer, device_bundle, tmp_path):
    """R1, R6: refused by name, over MQTT; what answers is the same as before."""
    start, load = offered
    agent = start()
    command(agent, "freeze", on=True)
    before = agent.core.loop.predictor.delta
    good = signer.packed(ports(device_bundle, harmful=False), device_bundle)
    stranger = Signer(tmp_path / "stranger").packed(ports(device_bundle, harmful=False), device_bundle)
    for data, sha256, why in (
        (good, "0" * 64, "expected 000000"),
        (good[:-1] + bytes([good[-1] ^ 1]), None, "damaged|not the one that was signed"),
        (stranger, None, "not trusted"),
        (b"PK\x03\x04 no package", None, "no package"),
    ):
        said = load(data, sha256)
        assert said.startswith("failed"), said
        assert any(part in said for part in why.split("|")), said
        assert agent.core.loop.predictor.delta is before and not agent.store.pending
    goes_on(agent)


@pytest.mark.fault(31)
def test_a_signed_adapter_that_does_harm_is_rolled_back(offered, signer, device_bundle):
    """R1, R6, R7: it answers on probation only, within a stated number of looks it is out, and that is told."""
    start, load = offered
    agent = start()
    harmful = ports(device_bundle, harmful=True)
    assert load(signer.packed(harmful, device_bundle)).startswith("done")
    until(lambda: told(agent, "rollback: adapter on probation"))
    until(lambda: not agent.store.pending and agent.board.status.slot == "own")
    assert not agent.core.loop.predictor.delta.same_as(harmful)
    goes_on(agent)


@pytest.mark.fault(31)
def test_a_signed_adapter_that_does_none_is_trusted_and_survives_a_restart(offered, signer, device_bundle):
    """R2, R6: after its probation it answers, and still does after a restart."""
    start, load = offered
    agent = start()
    gentle = ports(device_bundle, harmful=False)
    assert load(signer.packed(gentle, device_bundle)).startswith("done")
    until(lambda: told(agent, "adapter: probation passed"))
    until(lambda: not agent.store.pending)
    assert agent.core.loop.predictor.delta.same_as(gentle)
    agent.stopping.set()
    until(lambda: agent.board.status.state == "offline")
    again = start()
    assert again.core.loop.predictor.delta.same_as(gentle) and again.board.status.slot == "adapter"
    assert not again.board.status.on_probation
    goes_on(again)


# Refused, expired.


def test_a_broker_that_refuses_us_is_told_and_answers_go_on(running, mosquitto):
    """R1, R7: a wrong password makes the agent degraded, and nothing else."""
    agent = running(**mqtt_to(mosquitto("allow_anonymous false")))
    degraded(agent, "link: auth")
    goes_on(agent)


@pytest.mark.parametrize("whose", ["device", "broker"])
def test_an_expired_certificate_is_told_and_answers_go_on(running, mosquitto, tmp_path, whose):
    """R1, R7: an alert that names it; the agent answers and learns on."""
    pki = Pki(tmp_path / "pki")
    broker_files = pki.issue("broker", days=-1 if whose == "broker" else 30)
    device_files = pki.issue("ea-dev1", days=-1 if whose == "device" else 30)
    lines = ["cafile {}", "certfile {}", "keyfile {}"]
    files = (pki.ca, *broker_files)
    port = free_port()
    broker = mosquitto(
        f"listener {port} 127.0.0.1",
        *(line.format(path) for line, path in zip(lines, files, strict=True)),
        "require_certificate true",
        port=port,
    )
    tls = {"ca": pki.ca, "certificate": device_files[0], "key": device_files[1]}
    agent = running(**mqtt_to(broker, tls=tls))
    degraded(agent, {"device": "link: certificate", "broker": "link: tls"}[whose])
    assert told(agent, "certificate"), [event.text for event in agent.board.events()]
    goes_on(agent)
    assert agent.board.status.link == "offline"


def test_a_certificate_that_will_expire_is_told_in_time(running, mosquitto, observer, tmp_path):
    """R7: a retained alert days before, while everything still works."""
    pki = Pki(tmp_path / "pki")
    broker_files, device_files = pki.issue("broker"), pki.issue("ea-dev1", days=3)
    port, plain = free_port(), free_port()
    broker = mosquitto(
        f"listener {plain} 127.0.0.1",
        f"listener {port} 127.0.0.1",
        f"cafile {pki.ca}",
        f"certfile {broker_files[0]}",
        f"keyfile {broker_files[1]}",
        port=port,
    )
    broker.port = plain
    watcher = observer(broker)
    broker.port = port
    tls = {"ca": pki.ca, "certificate": device_files[0], "key": device_files[1]}
    agent = running(**mqtt_to(broker, tls=tls))
    degraded(agent, "link: certificate")
    until(lambda: any("certificate" in each["d"]["text"] for each in watcher.of(f"{ROOT}/alert/")))
    assert agent.board.status.link == "online" and told(agent, "the certificate expires in 3.0 days")


@pytest.mark.fault(6)
def test_a_full_disk_under_the_outbox_is_over_when_it_is_over(running, mosquitto, observer, monkeypatch):
    """R3, R7: while nothing can be written events wait in memory; then they arrive, and the agent is ready again."""
    broker = mosquitto()
    agent = running(**mqtt_to(broker))
    until(lambda: agent.board.status.link == "online")
    outbox = agent.network.courier._outbox
    watcher = observer(broker)
    with monkeypatch.context() as patch:

        def full(sync: bool) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(outbox, "_write", full)
        agent.tell("drift", "told while the disk was full")
        degraded(agent, "outbox cannot be written")
        goes_on(agent)
    until(lambda: any("disk was full" in each["d"]["text"] for each in watcher.of(f"{ROOT}/event/drift")))
    ready(agent)
    assert answered(agent) > 0
