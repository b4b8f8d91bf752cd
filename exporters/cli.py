"""`edge-adapt export` and `info`, and `check` for a bundle: arguments only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from exporters.warm_up import WarmUpPlan


def export(
    model: Annotated[str, typer.Argument(help="zoo:NAME, package.module:factory, or a path to an .onnx file")],
    out: Annotated[Path, typer.Option(help="folder of the bundle; made, with its parents")],
    weights: Annotated[Path | None, typer.Option(help=".safetensors or .pth for the model")] = None,
    cut: Annotated[str | None, typer.Option(help="module or tensor where the tail begins, or `input`")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="source frames: .npz, folder, sklearn:digits, or {har,usps,pacs,kws}-source:PATH")
    ] = None,
    warm_up: Annotated[
        str | None, typer.Option(help="labelled source images, .npz or folder, to train on with AugMix first")
    ] = None,
    warm_up_epochs: Annotated[int | None, typer.Option(help="passes over them; None: the default")] = None,
    estimate: Annotated[
        bool, typer.Option(help="fit the estimate of accuracy without labels too, on --calibration; takes a minute")
    ] = False,
    head: Annotated[str | None, typer.Option(help="labelled source frames to fit another last layer to")] = None,
    scale: Annotated[float, typer.Option(help="for an .onnx: raw values are divided by this")] = 1.0,
    mean: Annotated[str, typer.Option(help="for an .onnx: subtracted after that, with commas between channels")] = "0",
    std: Annotated[str, typer.Option(help="for an .onnx: divided by after that")] = "1",
    precision: Annotated[str, typer.Option(help="fp32")] = "fp32",
    force: Annotated[bool, typer.Option(help="replace an existing bundle")] = False,
) -> None:
    """Split a model at the cut, give every norm a port and a tap, and write a bundle that passed its parity gate."""
    from edge_adapt.errors import ConfigError
    from edge_adapt.streams.data import load_data
    from edge_adapt.threads import one_thread
    from exporters.export import export as run
    from exporters.export import from_spec
    from exporters.progress import shown

    one_thread()
    if precision != "fp32":
        raise ConfigError(f"precision {precision!r} is not supported", remedy="use fp32")
    frames = None
    if calibration is not None:
        data = load_data(calibration)
        frames = data.images if data.images is not None else next(iter(data.shifts.values()))
    typer.echo(f"exporting {model}", err=True)
    made = from_spec(model, weights=weights, fed=(scale, numbers(mean, "--mean"), numbers(std, "--std")))
    if head is not None:
        from exporters.head import with_head

        typer.echo("  fitting the head", err=True)
        made = with_head(made, load_data(head), None)
    plan = warm_up_plan(warm_up, warm_up_epochs, made.classes)
    if frames is None and plan is not None:
        frames = plan.data.images
    with shown() as progress:
        run(
            made,
            out,
            calibration=frames,
            cut=cut,
            warm_up=plan,
            estimate=estimate,
            force=force,
            report=lambda text: typer.echo(f"  {text}", err=True),
            progress=progress,
        )
    typer.echo(str(out))


def warm_up_plan(data: str | None, epochs: int | None, classes: Sequence[str] | None) -> WarmUpPlan | None:
    """What the options ask for. Raises: ConfigError, DataError."""
    from edge_adapt.errors import ConfigError
    from edge_adapt.streams.data import load_data
    from exporters.warm_up import WarmUpPlan, WarmUpSettings

    if data is None:
        if epochs is not None:
            raise ConfigError("--warm-up-epochs without --warm-up", remedy="add --warm-up DATA, labelled images")
        return None
    settings = WarmUpSettings() if epochs is None else WarmUpSettings(epochs=epochs)
    return WarmUpPlan(load_data(data, classes), settings)


def numbers(text: str, option: str) -> tuple[float, ...]:
    """`0.5,0.5` -> (0.5, 0.5). Raises: ConfigError."""
    from edge_adapt.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} is {text!r}, expected numbers with commas between", remedy="0.5,0.5,0.5") from None


def info(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle")],
    as_json: Annotated[bool, typer.Option("--json", help="print the manifest as it is")] = False,
) -> None:
    """Say what is inside a bundle."""
    from edge_adapt.bundle import read_manifest

    manifest = read_manifest(bundle)
    if as_json:
        typer.echo(json.dumps(manifest.model_dump(mode="json"), indent=1))
        return
    sites, spec, parity = manifest.sites, manifest.input, manifest.parity
    lines = {
        "model": manifest.name,
        "input": f"{spec.shape} {spec.layout} float32, (raw / {spec.scale:g} - {list(spec.mean)}) / {list(spec.std)}",
        "output": f"{manifest.outputs} {manifest.output}",
        "cut": f"{manifest.cut.name} {manifest.cut.shape}",
        "norm sites": f"{len(sites)}, {sum(site.channels for site in sites)} channels, "
        f"{sum(site.in_tail for site in sites)} sites in the tail",
        "calibration": f"{manifest.calibration_samples} frames",
        "parity": f"{max(parity.identity_ports, parity.random_ports, parity.tail):.1e} of the output's scale, "
        f"{parity.tolerance:.0e} allowed ({parity.samples} {parity.data} samples)",
        "opset": f"{manifest.opset}, {manifest.precision}",
        "created": manifest.created,
        **manifest.provenance,
    }
    if manifest.warm_up is not None:
        warm, epochs = manifest.warm_up, int(manifest.warm_up.settings["epochs"])
        (clean, later_clean), (augmented, later_augmented) = warm.clean_error, warm.augmented_error
        lines["warm-up"] = (
            f"{warm.family}, {epochs} epochs over {warm.images} images of {warm.data}; held-out error "
            f"{clean:g} -> {later_clean:g} % clean, {augmented:g} -> {later_augmented:g} % augmented"
        )
    for name, text in lines.items():
        typer.echo(f"{name:>12}  {text}")


def check(bundle: Path) -> None:
    """Verify hashes, schema and parity again: `edge-adapt check BUNDLE`. Raises: EdgeAdaptError for what is wrong."""
    from edge_adapt.threads import one_thread
    from exporters.export import check as run

    one_thread()
    errors = run(bundle, report=lambda text: typer.echo(f"  ok: {text}", err=True))
    for name, error in errors.items():
        typer.echo(f"{name:>12}  {error:.1e} of the output's scale")
