"""`edge-adapt check`: a configuration with what it names, a bundle, the schema, and the example that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agents.config_check import checked, schema_text
from device_agents.settings import AgentSettings
from edge_adapt.cli import run
from edge_adapt.config import load_config
from edge_adapt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "packaging" / "agent.example.yaml"


@pytest.fixture
def config(tmp_path, device_bundle):
    """Writes a configuration that is right, but for what is appended or replaced."""

    def write(more: str = "", **replaced: str) -> Path:
        (tmp_path / "frames").mkdir(exist_ok=True)
        lines = {
            "bundle": f"bundle: {device_bundle.path}",
            "source": "source: {kind: folder, path: frames}",
            **replaced,
        }
        path = tmp_path / "agent.yaml"
        path.write_text("\n".join(lines.values()) + f"\n{more}")
        return path

    return write


def wrong(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(path)
    return caught.value.what


def test_the_example_parses_and_shows_every_part():
    settings = load_config(EXAMPLE, AgentSettings)
    assert settings.mqtt is not None and settings.mqtt.tls is not None and settings.page is not None
    assert settings.bundle == EXAMPLE.parent / "bundle"
    text = EXAMPLE.read_text()
    parts = {name: getattr(settings, name) for name in AgentSettings.model_fields}
    named = [name for part in parts.values() for name in getattr(type(part), "model_fields", {})]
    missing = [name for name in (*parts, *named) if f"{name}:" not in text]
    assert set(missing) <= {"insecure"}  # nothing that an example should invite to


def test_the_published_schema_is_the_one_of_the_code():
    assert (ROOT / "docs" / "config.schema.json").read_text() == schema_text(), (
        "write it again: edge-adapt check --schema > docs/config.schema.json"
    )


def test_a_good_configuration_is_summed_up(config, capsys):
    assert run(["check", str(config("method: {name: moments+label_shift}\n"))]) == 0
    assert "mode shadow, method moments+label_shift, source folder, broker none" in capsys.readouterr().out


def test_everything_that_is_named_and_missing_is_told_at_once(config, tmp_path):
    (tmp_path / "empty.pub").touch()
    told = wrong(
        config(
            "engine: {name: onxruntime}\nmethod:\n  name: tentt+lable_shift\nmqtt:\n  password_file: secret\n"
            "  trusted_keys: [no.pub, empty.pub]\n  tls: {ca: ca.crt}\n",
            bundle="bundle: nowhere",
            source="source: {kind: archive, path: x.npz}",
        )
    )
    assert sorted(line.strip().split(": ")[:2] for line in told.splitlines()[1:]) == [
        [f"{tmp_path}/agent.yaml:{line}", name]
        for line, name in (
            *((1, "bundle"), (2, "source.path"), (3, "engine.name"), (5, "method.name"), (5, "method.name")),
            *((7, "mqtt.password_file"), (8, "mqtt.trusted_keys[0]"), (8, "mqtt.trusted_keys[1]"), (9, "mqtt.tls.ca")),
        )
    ]
    for meant in ("did you mean onnxruntime", "did you mean tent", "did you mean label_shift", "empty.pub is empty"):
        assert meant in told


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("{name: tent, settings: {learning: 3}}", "has no setting 'learning'"),
        ("{name: foa}", "cannot run on bundle"),
        ("{name: moments, settings: {period: fast}}", "moments cannot be built"),
    ],
)
def test_a_method_that_does_not_fit_the_bundle_is_told_with_its_line(config, method, told):
    text = wrong(config(f"method: {method}\n"))
    assert ":3: method: " in text and told in text


def test_a_damaged_bundle_is_told(config, device_bundle, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in device_bundle.path.iterdir():
        if file.is_file():
            (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "full.onnx").write_bytes(b"other")
    assert "full.onnx is damaged" in wrong(config(bundle=f"bundle: {damaged}"))


def test_the_command_tells_bundles_configurations_and_nothing_apart(config, device_bundle, capsys):
    assert run(["check", str(device_bundle.path)]) == 0
    assert "of the output's scale" in capsys.readouterr().out
    assert run(["check", "--schema"]) == 0
    assert capsys.readouterr().out == schema_text()
    assert run(["check"]) == 2
    assert run(["check", str(config("x: 1\n"))]) == 2
    told = capsys.readouterr().err
    assert "nothing to check" in told and "agent.yaml:3: x is no setting" in told and "Traceback" not in told
