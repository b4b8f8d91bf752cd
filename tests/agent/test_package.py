"""Signed deltas: nothing reaches a device that was not signed for it, and every refusal says why."""

from __future__ import annotations

import hashlib
import json
import stat
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from safetensors.numpy import save
from typer.testing import CliRunner

from device_agents import package
from device_agents.delta_cli import app
from device_agents.package import LENGTHS, MAGIC, PURPOSE, key_id, keygen, pack, private_key, public_key, read, verify
from edge_adapt.bundle import Bundle
from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, Delta
from edge_adapt.errors import ArtifactError, ConfigError, EdgeAdaptError, StateError
from edge_adapt.runtime.snapshot_file import Facts
from edge_adapt.runtime.snapshots import SnapshotStore

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
TRUSTED = [KEY.public_key()]


@pytest.fixture(scope="module")
def delta(device_bundle) -> Delta:
    return Delta({PORT_SCALE: np.full(device_bundle.channels, 1.25), PORT_SHIFT: np.zeros(device_bundle.channels)})


@pytest.fixture(scope="module")
def good(device_bundle, delta) -> bytes:
    when = datetime(2026, 1, 2, tzinfo=timezone.utc)
    return pack(delta, device_bundle, KEY, method="tent", note="foggy täp", created=when)


def parts(data: bytes) -> tuple[dict, bytes, bytes]:
    start = len(MAGIC) + LENGTHS.size
    manifest, signature, _ = LENGTHS.unpack_from(data, len(MAGIC))
    ends = start + manifest, start + manifest + signature
    return json.loads(data[start : ends[0]]), data[ends[0] : ends[1]], data[ends[1] :]


def forged(data: bytes, signer: Ed25519PrivateKey | None = KEY, body: bytes | None = None, **changes: object) -> bytes:
    """The same package saying something else, signed again; without a key it keeps its signature."""
    manifest, signature, old = parts(data)
    said = json.dumps({**manifest, **changes}, sort_keys=True, separators=(",", ":")).encode()
    signature = signature if signer is None else signer.sign(PURPOSE + said)
    body = old if body is None else body
    return MAGIC + LENGTHS.pack(len(said), len(signature), len(body)) + said + signature + body


def test_what_was_packed_is_what_was_verified(good, device_bundle, delta):
    found = verify(good, [OTHER.public_key(), *TRUSTED], device_bundle)
    assert found.delta.same_as(delta)
    assert found.manifest.bundle == device_bundle.id
    assert found.manifest.created == "2026-01-02T00:00:00+00:00"
    assert found.manifest.key == key_id(KEY.public_key())
    facts = found.facts(5)
    assert (facts.method, facts.ts) == ("tent", 5) and "foggy täp" in facts.note


def test_the_same_input_makes_the_same_package(good, device_bundle, delta):
    when = datetime(2026, 1, 2, tzinfo=timezone.utc)
    assert pack(delta, device_bundle, KEY, method="tent", note="foggy täp", created=when) == good


def test_every_changed_byte_is_found(good, device_bundle):
    for at in range(len(good)):
        wrong = bytearray(good)
        wrong[at] ^= 0x10
        with pytest.raises(EdgeAdaptError):
            verify(bytes(wrong), TRUSTED, device_bundle)


def test_every_truncation_is_found(good, device_bundle):
    for size in range(len(good)):
        with pytest.raises(ArtifactError):
            verify(good[:size], TRUSTED, device_bundle)
    with pytest.raises(ArtifactError, match="damaged"):
        verify(good + b"x", TRUSTED, device_bundle)


def test_an_unsigned_package_is_refused(good, device_bundle):
    manifest, _, body = parts(good)
    said = json.dumps(manifest).encode()
    with pytest.raises(ArtifactError, match="not signed"):
        verify(MAGIC + LENGTHS.pack(len(said), 0, len(body)) + said + body, TRUSTED, device_bundle)


def test_an_unknown_key_is_refused_by_its_id(good, device_bundle):
    with pytest.raises(ArtifactError, match=rf"{key_id(KEY.public_key())}.*not trusted.*{key_id(OTHER.public_key())}"):
        verify(good, [OTHER.public_key()], device_bundle)
    with pytest.raises(ArtifactError, match="trusted: none"):
        verify(good, [], device_bundle)


def test_a_changed_manifest_is_a_forgery(good, device_bundle):
    with pytest.raises(ArtifactError, match="forged"):
        verify(forged(good, None, note="other"), TRUSTED, device_bundle)
    with pytest.raises(ArtifactError, match="not trusted"):  # signed by another, who claims to be nobody known
        verify(forged(good, OTHER, key=key_id(OTHER.public_key())), TRUSTED, device_bundle)
    with pytest.raises(ArtifactError, match="forged"):  # signed by another in our name
        verify(forged(good, OTHER), TRUSTED, device_bundle)


def test_a_signature_made_for_something_else_does_not_fit(good, device_bundle):
    manifest, _, body = parts(good)
    said = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    signature = KEY.sign(said)
    with pytest.raises(ArtifactError, match="forged"):
        verify(MAGIC + LENGTHS.pack(len(said), 64, len(body)) + said + signature + body, TRUSTED, device_bundle)


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"schema_version": 2}, ArtifactError, "schema 2, this version reads up to 1"),
        ({"min_runtime": "99.0"}, ArtifactError, r"needs edge-adapt 99\.0"),
        ({"backbone": "0" * 64}, StateError, "another backbone"),
        ({"labels": "0" * 64}, StateError, "another set of classes"),
        ({"sha256": "0" * 64}, ArtifactError, "not the one that was signed"),
        ({"extra": 1}, ArtifactError, "extra"),
        ({"note": 5}, ArtifactError, "note"),
        ({"min_runtime": "1" * 9}, ArtifactError, "min_runtime"),
    ],
)
def test_a_signed_package_that_does_not_fit_is_refused(good, device_bundle, changes, kind, reason):
    with pytest.raises(kind, match=reason):
        verify(forged(good, **changes), TRUSTED, device_bundle)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({PORT_SHIFT: np.full(19, np.nan, np.float32)}, "NaN"),
        ({PORT_SCALE: np.ones(3, np.float32)}, "has shape"),
        ({"tail/x": np.full(2, 1e300)}, "dtype float64"),
        (b"no safetensors", "cannot be read"),
    ],
)
def test_a_signed_delta_that_is_bad_is_refused(good, device_bundle, tensors, reason):
    body = tensors if isinstance(tensors, bytes) else save(tensors)
    with pytest.raises(EdgeAdaptError, match=reason):
        verify(forged(good, body=body, sha256=hashlib.sha256(body).hexdigest()), TRUSTED, device_bundle)


def test_another_bundle_is_refused(good, device_bundle, reference_bundle):
    other = device_bundle.manifest.model_copy(update={"classes": tuple("abcde")})
    with pytest.raises(StateError, match="another set of classes"):
        verify(good, TRUSTED, Bundle(device_bundle.path, other, device_bundle.source))
    if package.backbone_of(reference_bundle) != package.backbone_of(device_bundle):
        with pytest.raises(StateError, match="another backbone"):
            verify(good, TRUSTED, reference_bundle)


@pytest.mark.parametrize(
    "data", [b"", b"EADELTA", b"PK\x03\x04" + bytes(40), MAGIC, MAGIC + LENGTHS.pack(2**32 - 1, 64, 0)]
)
def test_other_files_are_refused(device_bundle, data):
    with pytest.raises(ArtifactError):
        verify(data, TRUSTED, device_bundle)
    with pytest.raises(ArtifactError, match="newer format"):
        verify(b"EADELTA2" + bytes(100), TRUSTED, device_bundle)


def test_sizes_are_bounded_before_anything_is_parsed(tmp_path, device_bundle, monkeypatch):
    huge = tmp_path / "huge.eadelta"
    with huge.open("wb") as file:
        file.truncate(package.LARGEST + 1)
    with pytest.raises(ArtifactError, match="more than"):
        read(huge)
    with pytest.raises(ArtifactError, match="damaged"):
        verify(
            MAGIC + LENGTHS.pack(package.LARGEST_MANIFEST + 1, 64, 0) + bytes(package.LARGEST_MANIFEST + 65),
            [],
            device_bundle,
        )
    deep = b"[" * 60_000
    with pytest.raises(ArtifactError, match="cannot be read"):
        verify(MAGIC + LENGTHS.pack(len(deep), 64, 0) + deep + bytes(64), TRUSTED, device_bundle)


def test_nothing_bad_is_packed(device_bundle):
    with pytest.raises(StateError, match="NaN"):
        pack(Delta({PORT_SHIFT: np.full(device_bundle.channels, np.nan)}), device_bundle, KEY)
    with pytest.raises(ConfigError, match="min_runtime"):
        pack(Delta.source(), device_bundle, KEY, min_runtime="soon")


def test_keys_are_written_once_and_secret(tmp_path):
    public = keygen(tmp_path / "fleet")
    assert stat.S_IMODE((tmp_path / "fleet").stat().st_mode) == 0o600
    assert key_id(public_key(public)) == key_id(private_key(tmp_path / "fleet").public_key())
    before = (tmp_path / "fleet").read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        keygen(tmp_path / "fleet")
    public.unlink()
    with pytest.raises(ConfigError, match="exists already"):
        keygen(tmp_path / "fleet")
    assert (tmp_path / "fleet").read_bytes() == before
    (tmp_path / "fleet").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        private_key(tmp_path / "fleet")
    with pytest.raises(ConfigError, match="cannot be written"):
        keygen(tmp_path / "no folder" / "key")


def test_other_keys_are_refused(tmp_path):
    file = tmp_path / "key"
    file.write_bytes(b"nothing")
    file.chmod(0o600)
    for load in (private_key, public_key):
        with pytest.raises(ConfigError, match=r"is no (private|public) key"):
            load(file)
        with pytest.raises(ConfigError, match="cannot be read"):
            load(tmp_path / "none")
    rsa = generate_private_key(65537, 2048)
    file.write_bytes(
        rsa.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    with pytest.raises(ConfigError, match="expected Ed25519"):
        private_key(file)
    file.write_bytes(
        rsa.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(ConfigError, match="expected Ed25519"):
        public_key(file)


def call(*arguments: object) -> str:
    """Output of `edge-adapt delta ...`. Raises what it raises."""
    host = typer.Typer()
    host.add_typer(app, name="delta")
    result = CliRunner().invoke(host, ["delta", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_line_from_keys_to_an_adapter_on_probation(tmp_path: Path, device_bundle, delta):
    store = SnapshotStore.of(tmp_path / "one" / "snapshots", device_bundle)
    store.save(delta, Facts(method="tent"))
    key, out, bundle = tmp_path / "fleet", tmp_path / "out" / "fog.eadelta", device_bundle.path
    assert "key id" in call("keygen", key)
    told = call("pack", tmp_path / "one", "--bundle", bundle, "--key", key, "--out", out, "--note", "fog\x1b[31m")
    assert "2 tensors" in told
    told = call("verify", out, "--bundle", bundle, "--key", f"{key}.pub")
    assert "good" in told and "learned by tent" in told and "\x1b" not in told
    call("apply", out, "--bundle", bundle, "--key", f"{key}.pub", "--state", tmp_path / "two")
    other = SnapshotStore.of(tmp_path / "two" / "snapshots", device_bundle)
    assert other.load_latest() is None
    trial = other.begin_trial()
    assert trial is not None and trial.delta.same_as(delta)


def test_the_command_line_packs_a_saved_delta(tmp_path, device_bundle, delta):
    delta.save(tmp_path / "d.safetensors", bundle_id=device_bundle.id)
    keygen(tmp_path / "k")
    out, bundle = tmp_path / "x.eadelta", device_bundle.path
    call("pack", tmp_path / "d.safetensors", "--bundle", bundle, "--key", tmp_path / "k", "--out", out)
    assert verify(read(out), [public_key(tmp_path / "k.pub")], device_bundle).delta.same_as(delta)


def test_the_command_line_refuses_with_a_remedy(tmp_path, device_bundle, good):
    file, pub, bundle = tmp_path / "x.eadelta", keygen(tmp_path / "k"), device_bundle.path
    file.write_bytes(good)
    state = tmp_path / "state"
    with pytest.raises(ArtifactError, match="not trusted"):
        call("apply", file, "--bundle", bundle, "--key", pub, "--state", state)
    assert not state.exists()
    with pytest.raises(StateError, match="is source: nothing was learned"):
        call("pack", tmp_path, "--bundle", bundle, "--key", tmp_path / "k", "--out", tmp_path / "y")
