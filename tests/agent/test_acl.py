"""Access control: the generated files against a real mosquitto, with passwords and with mutual TLS."""

from __future__ import annotations

import queue
import shutil
import ssl
import subprocess
from types import SimpleNamespace

import pytest
from brokers import TOPICS, free_port, wait_until
from pki import Pki

from device_agents.acl import acl_file, mosquitto_conf
from device_agents.mqtt import Acked, Incoming, Link, LinkOptions, Message, Subscribed, Up
from device_agents.settings import MqttSettings
from device_agents.tls import days_left, tls_context
from edge_adapt.errors import ConfigError

PASSWORD = "pass word"


def users(path, *names):
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto_passwd is not installed")
    path.touch(mode=0o600)
    for name in names:
        subprocess.run(["mosquitto_passwd", "-b", str(path), name, PASSWORD], check=True, capture_output=True)
    return path


@pytest.fixture
def guarded(mosquitto, tmp_path):
    """A mosquitto under the generated files, with passwords."""
    settings = MqttSettings(port=free_port())
    acl = tmp_path / "acl"
    acl.write_text(acl_file("ea/v1", "lab", controllers=["boss"], readers=["ingest"]))
    passwords = users(tmp_path / "passwords", "dev1", "dev2", "boss", "ingest")
    if passwords.stat().st_uid == 0:
        for file in (acl, passwords):
            file.chmod(0o644)
    lines = mosquitto_conf(settings, tmp_path, acl=acl, passwords=passwords).splitlines()
    return mosquitto(*lines, port=settings.port)


def talk(broker, user):
    news = queue.SimpleQueue()
    options = LinkOptions(f"c-{user}", "127.0.0.1", broker.port, username=user, password=PASSWORD)
    link = Link(options, news)
    link.open()
    assert isinstance(news.get(timeout=5)[1], Up)

    def publish(topic):
        link.publish(Message(topic, b"{}"))
        return next_of(news, Acked).code

    def subscribe(*topics):
        link.subscribe(topics)
        return next_of(news, Subscribed).codes

    return SimpleNamespace(link=link, publish=publish, subscribe=subscribe, news=news)


def next_of(news, kind, timeout=5):
    while True:
        item = news.get(timeout=timeout)[1]
        if isinstance(item, kind):
            return item


OWN = (TOPICS.state, TOPICS.birth, TOPICS.reported, TOPICS.tele("perf"), TOPICS.event("drift"), TOPICS.alert("x"))
FOREIGN = (
    TOPICS.desired,
    TOPICS.cmd("reset"),
    TOPICS.xfer("a", 0),
    "ea/v1/lab/dev2/state",
    "ea/v1/lab/dev2/cmd/reset",
    "ea/v1/lab/_group/all/cmd/reset",
    "ea/v1/lab/_ctrl/boss/state",
    "ea/v1/lab/_ctrl/boss/reply/dev2/1",
    "ea/v1/hall/dev1/cmd/reset",
    "other",
)


def test_a_device_writes_its_own_and_a_foreign_topic_is_refused(guarded):
    device = talk(guarded, "dev1")
    assert {topic: device.publish(topic) for topic in OWN if device.publish(topic) >= 0x80} == {}
    assert device.publish("ea/v1/lab/_ctrl/boss/reply/dev1/7") < 0x80
    assert {topic for topic in FOREIGN if device.publish(topic) == 0x87} == set(FOREIGN)
    device.link.close()


def test_a_device_hears_its_controller_and_no_other_device(guarded):
    device, other, boss = talk(guarded, "dev1"), talk(guarded, "dev2"), talk(guarded, "boss")
    device.subscribe("#")
    assert other.publish("ea/v1/lab/dev2/tele/perf") < 0x80
    assert boss.publish("ea/v1/lab/dev2/cmd/ping") < 0x80
    topics = (TOPICS.cmd("ping"), TOPICS.desired, TOPICS.xfer("a", 0), "ea/v1/lab/_group/all/cmd/ping")
    assert [boss.publish(topic) < 0x80 for topic in topics] == [True] * 4
    assert [next_of(device.news, Incoming).topic for _ in topics] == list(topics)
    for each in (device, other, boss):
        each.link.close()


def test_a_reader_reads_and_writes_nothing(guarded):
    reader, device = talk(guarded, "ingest"), talk(guarded, "dev1")
    reader.subscribe("ea/v1/lab/#")
    device.publish(TOPICS.tele("perf"))
    assert next_of(reader.news, Incoming).topic == TOPICS.tele("perf")
    assert reader.publish(TOPICS.cmd("ping")) == 0x87
    for each in (reader, device):
        each.link.close()


def test_a_courier_works_under_the_generated_files(guarded, device, observer, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(f"{PASSWORD}\n")
    watcher = observer(guarded, username="ingest", password=PASSWORD, filters=("ea/v1/lab/#",))
    mine = device(guarded, mqtt={"username": "dev1", "password_file": secret}).start()
    mine.courier.event("drift", {})
    mine.courier.ack(TOPICS.ack("1"), {})
    wait_until(lambda: watcher.of(TOPICS.event("drift")) and watcher.of(TOPICS.ack("1")) and watcher.of(TOPICS.birth))
    assert not mine.alerts


@pytest.fixture
def pki(tmp_path):
    return Pki(tmp_path / "pki")


def over_tls(mosquitto, pki, tmp_path, **facts):
    """A mosquitto with mutual TLS under the generated files; settings for `dev1`."""
    server, server_key = pki.issue("broker", **facts)
    certificate, key = pki.issue("dev1")
    tls = {"ca": pki.ca, "certificate": certificate, "key": key}
    settings = MqttSettings(port=free_port(), tls=tls)
    acl = tmp_path / "acl"
    acl.write_text(acl_file("ea/v1", "lab"))
    lines = mosquitto_conf(settings, tmp_path, acl=acl, certificate=server, key=server_key).splitlines()
    return mosquitto(*lines, port=settings.port), tls


def test_mutual_tls_lets_the_device_in_by_the_name_of_its_certificate(mosquitto, device, pki, tmp_path):
    broker, tls = over_tls(mosquitto, pki, tmp_path)
    mine = device(broker, mqtt={"tls": tls}).start()
    mine.courier.event("drift", {})
    wait_until(lambda: mine.courier.waiting == 0)
    assert not mine.alerts and mine.outbox.quarantined == 0


def test_without_a_certificate_nobody_gets_in(mosquitto, device, pki, tmp_path):
    broker, _ = over_tls(mosquitto, pki, tmp_path)
    mine = device(broker, mqtt={"tls": {"ca": pki.ca}}).start(online=False)
    wait_until(lambda: mine.changes)
    assert not mine.courier.online and mine.courier.connects == 0


def test_an_unknown_authority_an_expired_certificate_and_a_wrong_name_are_refused(mosquitto, device, pki, tmp_path):
    for number, (facts, words) in enumerate(
        [({"days": -1}, "expired"), ({"host": "127.0.0.9"}, "mismatch"), ({}, "VERIFY_FAILED")]
    ):
        broker, tls = over_tls(mosquitto, pki, tmp_path, **facts)
        if not facts:
            tls["ca"] = Pki(tmp_path / "strange").ca
        mine = device(broker, mqtt={"tls": tls}, folder=f"d{number}").start(online=False)
        wait_until(lambda mine=mine: mine.alerts == ["tls"])
        assert words in mine.changes[0].reason
        mine.stop(0.2)


def test_a_clock_at_1970_may_accept_an_expired_broker_if_asked(mosquitto, device, pki, tmp_path, monkeypatch):
    broker, tls = over_tls(mosquitto, pki, tmp_path, days=-1)
    monkeypatch.setattr("device_agents.envelope.SystemClock.quality", lambda _: "unsync")
    wary = device(broker, mqtt={"tls": tls}, folder="wary").start(online=False)
    wait_until(lambda: wary.alerts == ["tls"])
    wary.stop(0.2)
    mine = device(broker, mqtt={"tls": {**tls, "accept_wrong_clock": True}}).start()
    assert mine.courier.online
    strange = Pki(tmp_path / "strange").ca
    other = device(broker, mqtt={"tls": {**tls, "ca": strange, "accept_wrong_clock": True}}, folder="other")
    other.start(online=False)
    wait_until(lambda: other.alerts == ["tls"])  # the chain is still checked


def test_a_certificate_about_to_expire_is_told(mosquitto, device, pki, tmp_path):
    broker, tls = over_tls(mosquitto, pki, tmp_path)
    certificate, key = pki.issue("dev1", days=13)
    mine = device(broker, mqtt={"tls": {**tls, "certificate": certificate, "key": key}}).start()
    wait_until(lambda: mine.alerts == ["certificate"])
    assert mine.changes[-1].online and 12.9 < days_left(certificate) < 13


def test_a_file_that_is_no_certificate_is_a_config_error(tmp_path, device, pki):
    bad = tmp_path / "bad.pem"
    bad.write_text("nothing")
    for tls in ({"ca": bad}, {"ca": tmp_path / "none.pem"}, {"ca": pki.ca, "certificate": bad, "key": bad}):
        mine = device(SimpleNamespace(port=1), mqtt={"tls": tls}, folder=f"f{len(str(tls))}")
        with pytest.raises(ConfigError, match=r"mqtt\.tls"):
            mine.courier.start()
    with pytest.raises(ConfigError, match="cannot be read"):
        days_left(bad)


def test_old_tls_is_refused(pki):
    settings = MqttSettings(tls={"ca": pki.ca})
    assert settings.tls is not None
    context = tls_context(settings.tls, clock_unset=False)
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert context.check_hostname and context.verify_mode == ssl.CERT_REQUIRED


def test_the_generated_configuration_avoids_the_40_ms_of_nagle(tmp_path):
    assert "set_tcp_nodelay true" in mosquitto_conf(MqttSettings(), tmp_path, acl=tmp_path / "acl")


@pytest.mark.parametrize("name", ["", "a b", "a\nuser boss", "#", "+"])
def test_a_name_cannot_smuggle_a_line_into_the_file(name):
    with pytest.raises(ConfigError):
        acl_file("ea/v1", "lab", controllers=[name])
    with pytest.raises(ConfigError):
        acl_file("ea/v1", name)


def test_tls_without_a_certificate_of_the_broker_is_refused(pki, tmp_path):
    with pytest.raises(ConfigError, match="no certificate"):
        mosquitto_conf(MqttSettings(tls={"ca": pki.ca}), tmp_path, acl=tmp_path / "acl")


def test_a_wrong_password_is_an_auth_alert(guarded, device, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("wrong")
    mine = device(guarded, mqtt={"username": "dev1", "password_file": secret}).start(online=False)
    wait_until(lambda: mine.alerts == ["auth"])
    assert not mine.courier.online
