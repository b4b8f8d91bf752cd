"""`edge-adapt delta`: make keys, sign what was learned, verify it, and hand it to a device. Arguments only."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from device_agents.package import Package
    from edge_adapt.bundle import Bundle
    from edge_adapt.delta import Delta

SNAPSHOTS = "snapshots"
"""The folder of the snapshots in a state folder."""

app = typer.Typer(no_args_is_help=True, help="Signed deltas: what was learned on one device, for others.")

BundleOption = Annotated[Path, typer.Option(help="folder of the bundle that the delta belongs to")]
KeysOption = Annotated[list[Path], typer.Option("--key", help="public key that is trusted; may be given twice")]
PackageArgument = Annotated[Path, typer.Argument(help=".eadelta file")]


@app.command()
def keygen(private: Annotated[Path, typer.Argument(help="private key to write; the public one is NAME.pub")]) -> None:
    """Make a pair of keys: the private one signs, the public one goes to the devices."""
    from device_agents.package import key_id, public_key
    from device_agents.package import keygen as make

    public = make(private)
    typer.echo(f"{private} (keep it secret) and {public}; key id {key_id(public_key(public))}")


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="saved delta (.safetensors), or state folder of an agent")],
    bundle: BundleOption,
    key: Annotated[Path, typer.Option(help="private key to sign with")],
    out: Annotated[Path, typer.Option(help="the .eadelta file to write")],
    slot: Annotated[str | None, typer.Option(help="A or B, of a state folder; none: the one in force")] = None,
    method: Annotated[str, typer.Option(help="what learned it, for the record")] = "",
    note: Annotated[str, typer.Option(help="for whoever reads it")] = "",
    min_runtime: Annotated[str | None, typer.Option(help="oldest version of edge-adapt that may load it")] = None,
) -> None:
    """Sign a delta, so that devices that trust the key may load it."""
    from device_agents.package import pack as make
    from device_agents.package import private_key
    from edge_adapt.bundle import Bundle

    found = Bundle.load(bundle)
    delta, learned_by = _delta(source, slot, found)
    data = make(delta, found, private_key(key), method=method or learned_by, note=note, min_runtime=min_runtime)
    _write(out, data)
    typer.echo(f"{out}: {len(data)} bytes, {len(delta)} tensors, for bundle {found.manifest.name} ({found.id})")


@app.command()
def verify(package: PackageArgument, bundle: BundleOption, keys: KeysOption) -> None:
    """Check signature, content and fit of a package, and say what is in it."""
    from edge_adapt.bundle import Bundle

    _say(_verified(package, keys, Bundle.load(bundle)))


@app.command()
def apply(
    package: PackageArgument,
    bundle: BundleOption,
    keys: KeysOption,
    state: Annotated[Path, typer.Option(help="state folder of the agent")],
) -> None:
    """Verify a package and hand it to an agent, which puts it on probation when it starts next."""
    from edge_adapt.bundle import Bundle
    from edge_adapt.runtime.snapshots import SnapshotStore

    found = Bundle.load(bundle)
    verified = _verified(package, keys, found)
    _say(verified)
    SnapshotStore.of(state / SNAPSHOTS, found).put_adapter(verified.delta, verified.facts(int(time.time() * 1000)))
    typer.echo(f"put into {state / SNAPSHOTS}; the agent tries it when it starts next")


def _delta(source: Path, slot: str | None, bundle: Bundle) -> tuple[Delta, str]:
    """What to pack, and which method learned it, where that is known."""
    from edge_adapt.delta import Delta
    from edge_adapt.errors import StateError
    from edge_adapt.runtime.snapshots import SnapshotStore

    if not source.is_dir():
        return Delta.load(source, bundle_id=bundle.id), ""
    store = SnapshotStore.of(source / SNAPSHOTS, bundle)
    wanted = slot or store.current
    snapshot = store.load(wanted)
    if not snapshot.delta:
        raise StateError(f"slot {wanted} of {source} is source: nothing was learned", remedy="choose another slot")
    return snapshot.delta, snapshot.facts.method


def _verified(package: Path, keys: list[Path], bundle: Bundle) -> Package:
    from device_agents.package import public_key, read
    from device_agents.package import verify as check

    return check(read(package), [public_key(key) for key in keys], bundle)


def _write(out: Path, data: bytes) -> None:
    from edge_adapt.delta import write_atomically
    from edge_adapt.errors import ConfigError

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, data)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}", remedy="choose another path") from error


def _say(package: Package) -> None:
    manifest = package.manifest
    size = package.delta.nbytes
    typer.echo(f"good: {len(package.delta)} tensors, {size} bytes, signed by {manifest.key} on {manifest.created}")
    typer.echo(f"  learned by {manifest.method or 'unknown'} on bundle {manifest.bundle}")
    if manifest.note:
        typer.echo(f"  note: {manifest.note!r}")
