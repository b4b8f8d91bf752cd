"""What is installed around the agent: the unit, the certificates, the broker's configuration, the page's files."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from brokers import Mosquitto, wait_until

from device_agents.acl import acl_file
from device_agents.broker import free_port
from device_agents.dashboard.document import FOLDER, SCRIPTS
from edge_adapt.cli import run as edge_adapt

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"
UNIT = PACKAGING / "edge-adapt.service"
MOST_EXPOSED = 2.0
"""Of 10, as `systemd-analyze security` counts."""


def tool(name: str) -> str:
    found = shutil.which(name, path="/usr/bin:/usr/sbin:/usr/local/bin:/bin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that exists here."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/edge-adapt/bin/edge-adapt", "/bin/true"))
    return copy


def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    done = run(tool("systemd-analyze"), "verify", unit)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_is_closed_as_far_as_it_can_be(unit: Path) -> None:
    done = run(tool("systemd-analyze"), "security", "--offline=yes", "--no-pager", unit)
    if "Unknown" in done.stderr or "unrecognized" in done.stderr:
        pytest.skip("this systemd-analyze judges no unit that is not installed")
    found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= MOST_EXPOSED


def test_the_unit_keeps_its_promises() -> None:
    lines = set(UNIT.read_text().splitlines())
    for line in ("Type=notify", "WatchdogSec=30", "Restart=on-failure", "StateDirectory=edge-adapt", "MemoryMax=2G"):
        assert line in lines
    assert "RestartPreventExitStatus=2" in lines  # what a wrong configuration exits with


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """An authority, a broker for loopback, two devices and a controller."""
    tool("openssl")
    folder = tmp_path / "pki"
    for arguments in (
        ("init",),
        ("broker", "localhost", "127.0.0.1", "::1"),
        ("device", "cam-7"),
        ("device", "cam-8"),
        ("device", "boss"),
    ):
        done = run("sh", PACKAGING / "pki.sh", arguments[0], folder, *arguments[1:])
        assert done.returncode == 0, done.stderr
    return folder


def test_the_certificates_say_who_they_are_for(pki: Path) -> None:
    for name, purpose in (("broker", "sslserver"), ("cam-7", "sslclient")):
        done = run(
            "openssl", "verify", "-CAfile", pki / "ca.crt", "-purpose", purpose, "-x509_strict", pki / f"{name}.crt"
        )
        assert done.returncode == 0, done.stdout + done.stderr
    wrong = run("openssl", "verify", "-CAfile", pki / "ca.crt", "-purpose", "sslserver", pki / "cam-7.crt")
    assert wrong.returncode != 0  # a device cannot play the broker
    subject = run("openssl", "x509", "-in", pki / "cam-7.crt", "-noout", "-subject", "-nameopt", "multiline")
    assert re.search(r"commonName\s+= cam-7$", subject.stdout, re.MULTILINE)
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    context.load_cert_chain(pki / "cam-7.crt", pki / "cam-7.key")


def test_keys_are_for_their_owner_and_nothing_is_left_lying_about(pki: Path) -> None:
    for key in pki.glob("*.key"):
        assert key.stat().st_mode & 0o077 == 0, key.name
    names = {"ca", "broker", "cam-7", "cam-8", "boss"}
    assert {path.name for path in pki.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("crt", "key")}


@pytest.mark.parametrize("name", ["../evil", "ca", "broker", "a b", "-x", "", "a/b", "x" * 65, "a;reboot", "a\nb"])
def test_a_name_that_is_none_is_refused(pki: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in pki.rglob("*")}
    done = run("sh", PACKAGING / "pki.sh", "device", pki, name)
    assert done.returncode == 2
    assert "pki.sh:" in done.stderr
    assert {path: path.read_bytes() for path in pki.rglob("*")} == before


def test_nothing_is_written_over(pki: Path) -> None:
    before = {path: path.read_bytes() for path in pki.rglob("*")}
    for arguments in (("init", pki), ("device", pki, "cam-7"), ("broker", pki, "localhost")):
        assert run("sh", PACKAGING / "pki.sh", *arguments).returncode == 2
    assert run("sh", PACKAGING / "pki.sh", "device", pki.parent / "none", "x").returncode == 2
    assert {path: path.read_bytes() for path in pki.rglob("*")} == before


@pytest.fixture
def site(pki: Path, mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> Mosquitto:
    """A broker as shipped: only the port and the paths are others."""
    port = free_port()
    acl = tmp_path / "edge-adapt.acl"
    acl.write_text(acl_file("ea/v1", "plant-1", controllers=("boss",)))
    text = (PACKAGING / "mosquitto.conf").read_text()
    text = text.replace("listener 8883", f"listener {port} 127.0.0.1").replace("/etc/mosquitto/certs", str(pki))
    text = text.replace("/etc/mosquitto/edge-adapt.acl", str(acl)).replace("/var/lib/mosquitto/", f"{tmp_path}/")
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "log_dest"))]
    return mosquitto(*lines, port=port)


def publish(site: Mosquitto, pki: Path, who: str | None, topic: str) -> int:
    own = ("--cert", pki / f"{who}.crt", "--key", pki / f"{who}.key") if who else ()
    command = (tool("mosquitto_pub"), "-h", "localhost", "-p", str(site.port), "--cafile", pki / "ca.crt", *own)
    return run(*command, "-V", "mqttv5", "-q", "1", "-t", topic, "-m", "x", "-i", f"ea-{who}").returncode


def test_the_shipped_broker_takes_devices_by_certificate_and_keeps_them_apart(site: Mosquitto, pki: Path) -> None:
    assert publish(site, pki, "cam-7", "ea/v1/plant-1/cam-7/state") == 0
    assert publish(site, pki, None, "ea/v1/plant-1/cam-7/state") != 0
    wait_until(lambda: "ea-cam-7" in site.log)
    listen = (tool("mosquitto_sub"), "-h", "localhost", "-p", str(site.port), "--cafile", pki / "ca.crt")
    own = ("--cert", pki / "cam-8.crt", "--key", pki / "cam-8.key")
    with subprocess.Popen(
        [*map(str, (*listen, *own)), "-t", "ea/v1/plant-1/#", "-t", "ea/v1/plant-1/cam-8/cmd/#", "-W", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as listener:
        wait_until(lambda: site.log.count("New client connected") >= 2)
        publish(site, pki, "cam-7", "ea/v1/plant-1/cam-8/cmd/reset")  # into another one's commands
        publish(site, pki, "cam-7", "ea/v1/plant-1/cam-7/state")  # not for other eyes
        publish(site, pki, "boss", "ea/v1/plant-1/cam-8/cmd/ping")
        heard = listener.communicate(timeout=10)[0]
    assert heard == b"x\n"  # from the controller alone


def test_the_container_has_no_secret_and_runs_as_no_root() -> None:
    text = (PACKAGING / "Dockerfile.l4t").read_text()
    assert re.search(r"^USER edge-adapt$", text, re.MULTILINE)
    assert "nvcr.io/nvidia/l4t-jetpack:r36" in text
    for folder in re.findall(r"^COPY (.+) /src/", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in folder.split()), folder


def test_the_parts_of_the_page_are_part_of_the_package() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = facts["tool"]["setuptools"]["package-data"]["device_agents"]
    parts = {FOLDER / name for name in ("page.html", "page.css", *SCRIPTS)}
    packed = {path for pattern in patterns for path in FOLDER.parent.glob(pattern)}
    assert parts <= packed


def test_every_command_of_the_agent_is_installed_under_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run", "rerun", "check", "acl", "delta", "top"):
        assert edge_adapt([name, "--help"]) == 0, name
        assert f"edge-adapt {name}" in capsys.readouterr().out


def test_the_page_of_instructions_names_only_what_is_there() -> None:
    text = (ROOT / "docs/jetson.md").read_text()
    for name in set(re.findall(r"\b(?:packaging|tests)/[\w./-]+\w", text)):
        assert (ROOT / name).exists(), name
