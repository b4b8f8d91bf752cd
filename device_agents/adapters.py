"""Adapters from outside: fetched, checked, and kept for their probation."""

from __future__ import annotations

import hashlib
import hmac
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from device_agents.package import LARGEST, Package, public_key, read, verify
from device_agents.transfer import Transfers
from edge_adapt.bundle import Bundle
from edge_adapt.errors import ArtifactError, ConfigError
from edge_adapt.runtime.snapshots import SnapshotStore

FETCH_S = 30.0
"""A server that says nothing for so long is given up."""
LONGEST_S = 600.0
"""A download that takes longer is given up, although something still comes."""
BLOCK = 1 << 16


class Adapters:
    """`take` is for the worker of slow commands; chunks come in through `transfers`, from the courier's thread."""

    def __init__(self, store: SnapshotStore, bundle: Bundle, trusted: Sequence[Path], *, inbox: Path) -> None:
        """
        Args:
            trusted: files of the public keys that may sign; read each time, so that a key can be taken away.
            inbox: folder where files may be put, and transfers end.
        """
        self._store, self._bundle, self._trusted, self._inbox = store, bundle, tuple(trusted), inbox
        self.transfers = Transfers(inbox)

    def take(
        self, sha256: str, *, url: str | None = None, file: str | None = None, transfer: str | None = None
    ) -> dict[str, Any]:
        """Keep a package as the adapter that waits for its probation; returns facts about it.

        Raises: ConfigError, ArtifactError or StateError that says what is wrong with it; nothing is kept then.
        """
        if not self._trusted:
            raise ConfigError("nobody may sign adapters for this device", remedy="set `mqtt.trusted_keys`")
        data = self._fetched(url, file, transfer)
        found = hashlib.sha256(data).hexdigest()
        if not hmac.compare_digest(found, sha256):
            raise ArtifactError(f"the package has sha256 {found}, expected {sha256}", remedy="send it again")
        package = verify(data, [public_key(path) for path in self._trusted], self._bundle)
        self._store.put_adapter(package.delta, package.facts(time.time_ns() // 1_000_000))
        return _facts(package)

    def _fetched(self, url: str | None, file: str | None, transfer: str | None) -> bytes:
        if url is not None:
            return fetched(url)
        if file is not None:
            return read(self._inbox / file)  # its name was checked: no separator, no dot in front
        assert transfer is not None
        return read(self.transfers.complete(transfer))


def fetched(url: str) -> bytes:
    """The body behind an address, at most `LARGEST` bytes. Raises: ArtifactError."""
    data, deadline = bytearray(), time.monotonic() + LONGEST_S
    try:
        with urllib.request.urlopen(url, timeout=FETCH_S) as answer:
            while len(data) <= LARGEST and (part := answer.read1(BLOCK)):
                data += part
                if time.monotonic() > deadline:
                    raise TimeoutError(f"after {LONGEST_S:g} s it was not complete")
    except (OSError, HTTPException, ValueError) as error:
        raise ArtifactError(f"{url} cannot be fetched: {error}", remedy="check the address from the device") from error
    if len(data) > LARGEST:
        raise ArtifactError(f"{url} has more than {LARGEST} bytes", remedy="a package is never so large")
    return bytes(data)


def _facts(package: Package) -> dict[str, Any]:
    manifest = package.manifest
    return {
        "package": package.sha256[:12],
        "method": manifest.method,
        "note": manifest.note,
        "bytes": package.delta.nbytes,
    }
