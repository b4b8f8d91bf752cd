"""Plans that were built on this device, kept for its next start. Safe to delete.

A plan holds machine code for one GPU, one version of TensorRT and one graph. It is named by a hash of all that it
depends on, and says the same in its first line: one that was copied here from elsewhere is known for what it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_adapt.errors import ArtifactError

PLAN, STAGED = ".plan", ".part"
KEPT = 8
"""Plans that are kept; older ones go when a new one comes."""
MOST_HEADER = 4096
LIFE = secrets.token_hex(4)
"""Tells what this process stages from what an earlier one of the same number left."""
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class PlanKey:
    """All that a plan depends on."""

    graph: str
    """sha256 of the ONNX file that it is built of."""
    library: str
    """Such as `tensorrt 10.3.0`."""
    gpu: str
    capability: str
    """Such as `8.7`."""
    precision: str
    max_batch: int
    flags: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def sealed(plan: bytes, key: PlanKey) -> bytes:
    """A plan as it is kept: a line with the key and a checksum, then the plan."""
    header = {"key": asdict(key), "sha256": hashlib.sha256(plan).hexdigest()}
    return json.dumps(header, sort_keys=True).encode() + b"\n" + plan


def unsealed(data: bytes, key: PlanKey) -> bytes:
    """The plan. Raises: ArtifactError that says whether it is damaged, or what it was built for."""
    line, _, plan = data[:MOST_HEADER].partition(b"\n")
    try:
        header = json.loads(line)
        found, expected = dict(header["key"]), header["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ArtifactError("the plan is damaged: its first line is no key", remedy="it is built again") from None
    wanted = json.loads(json.dumps(asdict(key)))
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ArtifactError(
                f"the plan was built for {name} {str(found.get(name))[:60]}, here it is {str(value)[:60]}",
                remedy="it is built again",
            )
    plan = data[len(line) + 1 :]
    if hashlib.sha256(plan).hexdigest() != expected:
        raise ArtifactError("the plan is damaged: its checksum is another", remedy="it is built again")
    return plan


class PlanCache:
    """A folder of plans. One process builds into it, any number may read."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()

    def load(self, key: PlanKey) -> bytes | None:
        """The plan, or None if there is none. Raises: ArtifactError if there is one that cannot be used."""
        try:
            data = self.path(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ArtifactError(f"the plan cannot be read: {error.strerror}", remedy="it is built again") from error
        return unsealed(data, key)

    def path(self, key: PlanKey) -> Path:
        return self.folder / f"{key.digest}{PLAN}"

    def stage(self, key: PlanKey) -> Path:
        """Where a builder writes; what a builder that died left there is gone. Raises: OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clear_abandoned()
        return self.folder / f"{key.digest}.{os.getpid()}.{LIFE}-{next(_NUMBERS)}{STAGED}"

    def publish(self, staged: Path, key: PlanKey) -> bytes:
        """Check what a builder wrote, and give it its name. Raises: ArtifactError if it is not whole; OSError."""
        plan = unsealed(staged.read_bytes(), key)
        path = self.path(key)
        staged.replace(path)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._prune(path)
        return plan

    def clear_abandoned(self) -> None:
        """Remove what builders of processes that are gone left behind."""
        for path in self.folder.glob(f"*{STAGED}*"):
            owner, _, rest = path.name.partition(".")[2].partition(".")
            ours = owner == str(os.getpid())  # in a container every life has the same number
            if not rest.startswith(LIFE) if ours else not Path(f"/proc/{owner}").exists():
                with contextlib.suppress(OSError):
                    path.unlink()

    def _prune(self, newest: Path) -> None:
        plans = sorted(self.folder.glob(f"*{PLAN}"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in [path for path in plans if path != newest][KEPT - 1 :]:
            with contextlib.suppress(OSError):
                path.unlink()


def write_staged(staged: Path, data: bytes) -> None:
    """Write and sync, in the process that builds. Raises: OSError, and nothing is left."""
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/edge-adapt/engines`: the bundle's own folder may be read-only, or on another machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge-adapt" / "engines"
