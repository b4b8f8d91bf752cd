"""Access control: the generated files against a real mosquitto, with passwords and with mutual TLS."""

from __future__ import annotations

import json
import queue
import shutil
import ssl
import subprocess
from types import SimpleNamespace

import pytest
from agents import running, settings, stream
from brokers import TOPICS, free_port, wait_until
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from pki import Pki

from device_agents.acl import acl_file, acl_of, mosquitto_conf
from device_agents.homeassistant import STATUS_TOPIC, discovery_topic
from device_agents.mqtt import Acked, Incoming, Link, LinkOptions, Message, Subscribed, Up
from device_agents.settings import MqttSettings
from device_agents.tls import days_left, tls_context
from edge_adapt.cli import run
from edge_adapt.errors import ConfigError

__all__ = ["running", "settings", "stream"]
PASSWORD = "pass word"


def users(path, *names):
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto_passwd is not installed")
    path.touch(mode=0o600)
    for name in names:
        subprocess.run(["mosquitto_passwd", "-b", str(path), name, PASSWORD], check=True, capture_output=True)
    return path


@pytest.fixture
def under(mosquitto, tmp_path):
    """A factory: a mosquitto under an ACL and the generated configuration, with passwords."""

    def make(text):
        settings = MqttSettings(port=free_port())
        acl = tmp_path / "acl"
        acl.write_text(text)
        passwords = users(tmp_path / "passwords", "dev1", "dev2", "boss", "ingest", "ha", "camera")
        if passwords.stat().st_uid == 0:
            for file in (acl, passwords):
                file.chmod(0o644)
        lines = mosquitto_conf(settings, tmp_path, acl=acl, passwords=passwords).splitlines()
        return mosquitto(*lines, port=settings.port)

    return make


@pytest.fixture
def guarded(under):
    return under(acl_file("ea/v1", "lab", controllers=["boss"], readers=["ingest"]))


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


ANNOUNCED = discovery_topic("lab", "dev1")


def test_a_device_announces_itself_to_home_assistant_and_no_other_device_does(under):
    broker = under(acl_file("ea/v1", "lab", announced=["dev1"], home_assistant="ha"))
    device, other, hub = talk(broker, "dev1"), talk(broker, "dev2"), talk(broker, "ha")
    assert device.publish(ANNOUNCED) < 0x80 and device.publish(TOPICS.state) < 0x80
    assert other.publish(ANNOUNCED) == 0x87 and other.publish(discovery_topic("lab", "dev2")) == 0x87
    assert device.publish(STATUS_TOPIC) == 0x87 and hub.publish(TOPICS.cmd("reset")) == 0x87
    device.subscribe(STATUS_TOPIC)
    assert hub.publish(STATUS_TOPIC) < 0x80
    assert next_of(device.news, Incoming).topic == STATUS_TOPIC
    hub.subscribe(TOPICS.tele("perf"), "homeassistant/#")
    device.publish(TOPICS.tele("perf"))
    assert next_of(hub.news, Incoming).topic == TOPICS.tele("perf")
    for each in (device, other, hub):
        each.link.close()


def test_without_discovery_home_assistant_is_no_topic_of_the_file():
    assert "homeassistant" not in acl_file("ea/v1", "lab", controllers=["boss"], readers=["ingest"])


def test_images_that_a_device_takes_as_frames_reach_it(under):
    text = acl_file("ea/v1", "lab", images=["cameras/7/jpeg"])
    broker = under(f"{text}\nuser camera\ntopic write cameras/#\n")
    device, camera = talk(broker, "dev1"), talk(broker, "camera")
    device.subscribe("cameras/#")
    for topic in ("cameras/8/jpeg", "cameras/7/jpeg"):
        assert camera.publish(topic) < 0x80
    assert next_of(device.news, Incoming).topic == "cameras/7/jpeg"
    assert device.publish("cameras/7/jpeg") == 0x87
    for each in (device, camera):
        each.link.close()


def test_an_agent_that_is_announced_needs_nothing_that_the_file_refuses(under, running, observer, settings, tmp_path):
    facts = {
        "site": "lab",
        "device": "dev1",
        "telemetry": {"interval_s": 0.5, "minimum_s": 0.25, "home_assistant": True},
    }
    mqtt = {"port": 1, "keepalive_s": 2, "username": "dev1", "password_file": tmp_path / "secret"}
    mqtt["password_file"].write_text(PASSWORD)
    broker = under(acl_of([settings(**facts, mqtt=mqtt)], controllers=["boss"], home_assistant="ha"))
    hub = observer(broker, client_id="ha", username="ha", password=PASSWORD)
    boss = observer(broker, client_id="boss", username="boss", password=PASSWORD)
    agent = running(**facts, mqtt={**mqtt, "port": broker.port})
    wait_until(lambda: hub.of(ANNOUNCED) and hub.of(TOPICS.tele("perf")) and hub.of(TOPICS.reported))
    hub.publish(STATUS_TOPIC, "online")
    wait_until(lambda: len(hub.of(ANNOUNCED)) == 2)
    reply = "ea/v1/lab/_ctrl/boss/reply/dev1"
    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic, properties.MessageExpiryInterval = reply, 30
    properties.UserProperty = [("idem", "k1")]
    boss.publish(TOPICS.cmd("ping"), b'{"v":1}', properties=properties)
    wait_until(lambda: [one["d"]["status"] for one in boss.of(reply)] == ["accepted", "done"])
    assert agent.board.status.state == "ready" and not agent.network.troubles
    assert not [event for event in agent.board.events() if "link" in event.text and event.severity != "info"]


def test_devices_of_two_sites_and_without_a_broker_have_no_file_in_common(settings):
    one = settings(mqtt={}, site="lab")
    assert acl_of([one, settings(mqtt={}, site="lab", device="b")]) == acl_file("ea/v1", "lab")
    for others in ([settings(mqtt={}, site="hall")], [settings(mqtt={"prefix": "x"}, site="lab")], [settings()]):
        with pytest.raises(ConfigError, match="no devices of one site"):
            acl_of([one, *others])
    with pytest.raises(ConfigError, match="no devices of one site"):
        acl_of([settings()])


def test_the_command_prints_the_file_of_configurations(tmp_path, settings, capsys):
    source = {"kind": "mqtt", "topic": "cameras/7/jpeg"}
    for name, facts in (("a", {"telemetry": {"home_assistant": True}}), ("b", {"source": source})):
        made = settings(site="lab", device=name, mqtt={}, **facts)
        (tmp_path / f"{name}.yaml").write_text(json.dumps(made.model_dump(mode="json", exclude_unset=True)) + "\n")
    options = ["--controller", "boss", "--reader", "ingest", "--home-assistant", "ha"]
    assert run(["acl", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), *options]) == 0
    assert capsys.readouterr().out == acl_file(
        "ea/v1",
        "lab",
        controllers=["boss"],
        readers=["ingest"],
        announced=["a"],
        home_assistant="ha",
        images=["cameras/7/jpeg"],
    )


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
    with pytest.raises(ConfigError):
        acl_file("ea/v1", "lab", images=[f"cameras/{name}"])


def test_tls_without_a_certificate_of_the_broker_is_refused(pki, tmp_path):
    with pytest.raises(ConfigError, match="no certificate"):
        mosquitto_conf(MqttSettings(tls={"ca": pki.ca}), tmp_path, acl=tmp_path / "acl")


def test_a_wrong_password_is_an_auth_alert(guarded, device, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("wrong")
    mine = device(guarded, mqtt={"username": "dev1", "password_file": secret}).start(online=False)
    wait_until(lambda: mine.alerts == ["auth"])
    assert not mine.courier.online
