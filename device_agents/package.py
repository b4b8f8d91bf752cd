"""Signed deltas: what was learned elsewhere, as one file that a device trusts only by an Ed25519 signature.

The file: magic, three lengths, manifest (canonical JSON), signature of the manifest, delta as safetensors. The manifest
holds the sha256 of the delta and of what it was learned on. No archive format: nothing unpacks, no names of files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge_adapt.bundle import FULL, Bundle
from edge_adapt.delta import Delta, write_atomically
from edge_adapt.errors import ArtifactError, ConfigError, StateError
from edge_adapt.runtime.snapshot_file import Facts

SCHEMA = 1
SUFFIX = ".eadelta"
MAGIC = b"EADELTA1"
LENGTHS = struct.Struct("<III")
"""Bytes of manifest, signature and delta."""
LARGEST = 64 << 20
LARGEST_MANIFEST = 64 << 10
SIGNATURE = 64
PURPOSE = b"edge-adapt delta manifest\0"
"""Signed before the manifest, so that no signature made for something else fits."""
REMEDY = "get the file again from whoever made it"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """What a package says of itself. All of it is signed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = 1
    sha256: Sha256
    """Of the delta."""
    bundle: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    """Id of the bundle that it was learned on; another one with the same backbone and labels will do."""
    backbone: Sha256
    labels: Sha256
    created: Annotated[str, Field(pattern=r"^[0-9T:.+Z-]{10,40}$")]
    min_runtime: Annotated[str, Field(pattern=r"^\d{1,6}(\.\d{1,6}){0,3}$")]
    method: Annotated[str, Field(pattern="^[ -~]{0,256}$")] = ""
    note: Annotated[str, Field(max_length=4096)] = ""
    key: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    """Id of the key that signed."""


@dataclass(frozen=True)
class Package:
    """A package that was verified."""

    manifest: Manifest
    delta: Delta
    sha256: str
    """Of the whole file."""

    def facts(self, ts: int) -> Facts:
        """What a snapshot says of it; `ts` is the wall clock in milliseconds."""
        manifest = self.manifest
        return Facts(ts=ts, method=manifest.method, note=f"package {self.sha256[:12]}: {manifest.note}"[:200])


def backbone_of(bundle: Bundle) -> str:
    """Hash of what a delta has to fit: the network, and the order of its sites."""
    sites = [(site.name, site.channels) for site in bundle.manifest.sites]
    return _hash([bundle.manifest.files[FULL], sites])


def labels_of(bundle: Bundle) -> str:
    """Hash of the names of the classes, or of their number where they have none."""
    manifest = bundle.manifest
    return _hash(manifest.classes if manifest.classes is not None else manifest.outputs)


def pack(
    delta: Delta,
    bundle: Bundle,
    key: Ed25519PrivateKey,
    *,
    method: str = "",
    note: str = "",
    min_runtime: str | None = None,
    created: datetime | None = None,
) -> bytes:
    """A signed package. Raises: StateError if the delta does not fit the bundle or is not finite."""
    bundle.check_delta(delta)
    body = save(dict(delta.tensors))
    if len(body) > LARGEST - LARGEST_MANIFEST:
        raise StateError(f"the delta has {len(body)} bytes, a package at most {LARGEST}", remedy="let it learn less")
    try:
        manifest = Manifest(
            sha256=hashlib.sha256(body).hexdigest(),
            bundle=bundle.id,
            backbone=backbone_of(bundle),
            labels=labels_of(bundle),
            created=(created or datetime.now(timezone.utc)).isoformat(timespec="seconds"),
            min_runtime=min_runtime or "0.1",
            method=method,
            note=note,
            key=key_id(key.public_key()),
        )
    except ValidationError as error:
        raise ConfigError(f"the package cannot be described: {_first(error)}", remedy="correct that value") from error
    said = _canonical(manifest.model_dump())
    signature = key.sign(PURPOSE + said)
    return MAGIC + LENGTHS.pack(len(said), len(signature), len(body)) + said + signature + body


def verify(data: bytes, keys: Sequence[Ed25519PublicKey], bundle: Bundle) -> Package:
    """Check everything, the signature before anything that it covers is believed.

    Args:
        data: the file, at most `LARGEST` bytes.
        keys: who is trusted.
        bundle: what the delta shall run on.
    Raises: ArtifactError if damaged, unsigned, signed by another key or too new; StateError if it does not fit.
    """
    said, signature, body = _parts(data)
    _check_signature(said, signature, keys)
    manifest = _manifest(said)
    if hashlib.sha256(body).hexdigest() != manifest.sha256:
        raise ArtifactError("the delta in the package is not the one that was signed", remedy=REMEDY)
    _check_fit(manifest, bundle)
    delta = _delta(body)
    bundle.check_delta(delta)
    return Package(manifest, delta, hashlib.sha256(data).hexdigest())


def read(path: Path) -> bytes:
    """A package file, no more than a package may have. Raises: ArtifactError if it is too large or unreadable."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}", remedy="check the path") from error
    if len(data) > LARGEST:
        raise ArtifactError(f"{path} has more than {LARGEST} bytes, the most for a package", remedy=REMEDY)
    return data


def keygen(private: Path) -> Path:
    """Write a new private key, readable by its owner alone, and `<name>.pub` beside it; returns the latter's path.

    Raises: ConfigError if one of them exists or cannot be written.
    """
    public = private.with_name(f"{private.name}.pub")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    if public.exists():
        raise ConfigError(f"{public} exists already", remedy="choose another name; no key is overwritten")
    try:
        descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret)
        write_atomically(
            public,
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        )
    except FileExistsError as error:
        raise ConfigError(f"{private} exists already", remedy="choose another name; no key is overwritten") from error
    except OSError as error:
        raise ConfigError(f"{private} cannot be written: {error.strerror}", remedy="choose another folder") from error
    return public


def private_key(path: Path) -> Ed25519PrivateKey:
    """Raises: ConfigError if it is no Ed25519 private key in PEM, or others than its owner may read it."""
    data = _key_bytes(path)
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} may be read by others than its owner", remedy=f"chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no private key without a password: {error}", remedy=_KEYGEN) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is a {type(key).__name__}, expected Ed25519", remedy=_KEYGEN)
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """Raises: ConfigError if it is no Ed25519 public key in PEM."""
    try:
        key = serialization.load_pem_public_key(_key_bytes(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no public key: {error}", remedy=_KEYGEN) from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is a {type(key).__name__}, expected Ed25519", remedy=_KEYGEN)
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """16 hexadecimal digits that name a key."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


_KEYGEN = "make a pair with `edge-adapt delta keygen`"


def _key_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_MANIFEST)
    except OSError as error:
        raise ConfigError(f"the key {path} cannot be read: {error.strerror}", remedy=_KEYGEN) from error


def _parts(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Manifest, signature and delta, once all lengths were found to fit."""
    start = len(MAGIC) + LENGTHS.size
    if len(data) > LARGEST:
        raise ArtifactError(f"the package has {len(data)} bytes, at most {LARGEST} are read", remedy=REMEDY)
    if len(data) < start or not data.startswith(MAGIC[:-1]):
        raise ArtifactError("this is no package of a delta", remedy=f"`edge-adapt delta pack` makes a {SUFFIX} file")
    if not data.startswith(MAGIC):
        raise ArtifactError("the package has a newer format than this version reads", remedy="upgrade edge-adapt")
    manifest, signature, body = LENGTHS.unpack_from(data, len(MAGIC))
    if start + manifest + signature + body != len(data) or manifest > LARGEST_MANIFEST:
        raise ArtifactError(
            f"the package is damaged: {len(data)} bytes, its lengths say {start + manifest + signature + body}",
            remedy=REMEDY,
        )
    if not signature:
        raise ArtifactError("the package is not signed", remedy="pack it with a key that this device trusts")
    if signature != SIGNATURE:
        raise ArtifactError(f"the package is damaged: its signature has {signature} bytes", remedy=REMEDY)
    ends = start + manifest, start + manifest + signature
    return data[start : ends[0]], data[ends[0] : ends[1]], data[ends[1] :]


def _check_signature(said: bytes, signature: bytes, keys: Sequence[Ed25519PublicKey]) -> None:
    for key in keys:
        try:
            key.verify(signature, PURPOSE + said)
        except InvalidSignature:
            continue
        return
    claimed = str(_json(said).get("key"))[:16]
    if claimed in {key_id(key) for key in keys}:
        raise ArtifactError("the package is damaged, or forged: its signature does not fit", remedy=REMEDY)
    trusted = ", ".join(key_id(key) for key in keys) or "none"
    raise ArtifactError(
        f"the package is signed by key {claimed!r}, which is not trusted here (trusted: {trusted})",
        remedy="add its public key to `trusted_keys`, if you trust whoever holds it",
    )


def _manifest(said: bytes) -> Manifest:
    raw = _json(said)
    schema = raw.get("schema_version")
    if isinstance(schema, int) and schema > SCHEMA:
        raise ArtifactError(f"the package has schema {schema}, this version reads up to {SCHEMA}", remedy=_UPGRADE)
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"the manifest does not fit the schema: {_first(error)}", remedy=REMEDY) from error


_UPGRADE = "upgrade edge-adapt on this device"


def _check_fit(manifest: Manifest, bundle: Bundle) -> None:
    here = version("edge-adapt")
    if _numbers(manifest.min_runtime) > _numbers(here):
        raise ArtifactError(f"the package needs edge-adapt {manifest.min_runtime}, this is {here}", remedy=_UPGRADE)
    for what, theirs, ours in (
        ("backbone", manifest.backbone, backbone_of(bundle)),
        ("set of classes", manifest.labels, labels_of(bundle)),
    ):
        if theirs != ours:
            raise StateError(
                f"the delta was learned on another {what} ({theirs[:12]}..., bundle {manifest.bundle}) "
                f"than that of bundle {bundle.manifest.name!r} ({ours[:12]}...)",
                remedy="apply it to the bundle that it was learned on",
            )


def _delta(body: bytes) -> Delta:
    try:
        tensors = load(body)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"the delta in the package cannot be read: {error}", remedy=REMEDY) from error
    for name, value in tensors.items():
        if value.dtype != np.float32:
            raise ArtifactError(f"{name} in the package has dtype {value.dtype}, expected float32", remedy=REMEDY)
    return Delta(tensors)


def _json(said: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(said)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the manifest of the package cannot be read: {error}", remedy=REMEDY) from error
    if not isinstance(raw, dict):
        raise ArtifactError("the manifest of the package is no object", remedy=REMEDY)
    return raw


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _hash(value: Any) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()


def _numbers(text: str) -> tuple[int, ...]:
    """1.2.3.dev4 -> (1, 2, 3)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
