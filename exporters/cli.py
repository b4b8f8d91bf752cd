"""`edge-adapt export` and `info`, and `check` for a bundle: arguments only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edge_adapt.bundle import Quantised
    from exporters.quantise import QuantisePlan
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
    precision: Annotated[str, typer.Option(help="of the answers: fp32, or int8, which needs --calibration")] = "fp32",
    target: Annotated[str | None, typer.Option(help="of int8: cpu, or tensorrt, which is slow on a CPU")] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="of int8: points of accuracy that may be lost; without labels, % of answers that change"),
    ] = None,
    check_tensorrt: Annotated[
        bool, typer.Option("--check-tensorrt", help="have TensorRT build every graph; exit code 2 if it refuses one")
    ] = False,
    force: Annotated[bool, typer.Option(help="replace a bundle; write an int8 one that loses more")] = False,
) -> None:
    """Split a model at the cut, give every norm a port and a tap, and write a bundle that passed its parity gate."""
    from edge_adapt.streams.data import load_data
    from edge_adapt.threads import one_thread
    from exporters.export import export as run
    from exporters.export import from_spec
    from exporters.progress import shown

    one_thread()
    if check_tensorrt:
        from edge_adapt.engines.tensorrt_build import library

        library()  # before minutes of work
    frames = labels = None
    if calibration is not None:
        data = load_data(calibration)
        frames = data.images if data.images is not None else next(iter(data.shifts.values()))
        labels = data.labels
    int8 = int8_plan(precision, target, max_loss, labels)
    if int8 is not None and warm_up is None:
        from exporters.quantise import check_calibration

        check_calibration(frames)  # before minutes of work
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
            int8=int8,
            force=force,
            report=lambda text: typer.echo(f"  {text}", err=True),
            progress=progress,
        )
    typer.echo(str(out))
    if check_tensorrt:
        accepted_by_tensorrt(out)


def int8_plan(
    precision: str, target: str | None, max_loss: float | None, labels: NDArray[Any] | None
) -> QuantisePlan | None:
    """What the options ask for. Raises: ConfigError."""
    from edge_adapt.errors import ConfigError
    from exporters.quantise import QuantisePlan, named_target

    if precision == "int8":
        return QuantisePlan(named_target(target or "cpu"), labels, max_loss)
    if precision != "fp32":
        raise ConfigError(f"precision {precision!r} is not supported", remedy="use fp32 or int8")
    for option, value in (("--target", target), ("--max-loss", max_loss)):
        if value is not None:
            raise ConfigError(f"{option} without --precision int8", remedy="add --precision int8, or leave it out")
    return None


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
        "opset": str(manifest.opset),
        "answers in": manifest.precision,
        "created": manifest.created,
        **manifest.provenance,
    }
    if manifest.quantised is not None:
        lines |= int8_lines(manifest.quantised)
    if manifest.warm_up is not None:
        warm, epochs = manifest.warm_up, int(manifest.warm_up.settings["epochs"])
        (clean, later_clean), (augmented, later_augmented) = warm.clean_error, warm.augmented_error
        lines["warm-up"] = (
            f"{warm.family}, {epochs} epochs over {warm.images} images of {warm.data}; held-out error "
            f"{clean:g} -> {later_clean:g} % clean, {augmented:g} -> {later_augmented:g} % augmented"
        )
    for name, text in lines.items():
        typer.echo(f"{name:>12}  {text}")


def int8_lines(facts: Quantised) -> dict[str, str]:
    """What `info` says of an INT8 graph."""
    made = {
        "answers in": f"int8 for {facts.target}: {facts.layers} layers, {facts.agreement[0]:g} % of the answers as in "
        f"float32 ({facts.agreement[1]:g} % with other ports), {facts.speed:g} times as fast"
    }
    if facts.float_top1 and facts.int8_top1:
        pairs = zip(facts.int8_top1, facts.float_top1, ("as exported", "with other ports"), strict=True)
        made["int8 top-1"] = ", ".join(f"{int8:g} % (float32 {plain:g} %) {ports}" for int8, plain, ports in pairs)
    return made


def accepted_by_tensorrt(path: Path) -> None:
    """Have every graph of a bundle built. Raises: EngineError if nothing builds here, ArtifactError for a refusal."""
    from edge_adapt.bundle import Bundle
    from exporters.tensorrt import check as run

    run(Bundle.load(path), report=lambda text: typer.echo(f"  {text}", err=True))


def check(bundle: Path, *, tensorrt: bool = False) -> None:
    """Verify hashes, schema and parity again: `edge-adapt check BUNDLE`. Raises: EdgeAdaptError for what is wrong."""
    from edge_adapt.threads import one_thread
    from exporters.export import check as run

    one_thread()
    errors = run(bundle, report=lambda text: typer.echo(f"  ok: {text}", err=True))
    for name, error in errors.items():
        typer.echo(f"{name:>12}  {error:.1e} of the output's scale")
    if tensorrt:
        accepted_by_tensorrt(bundle)
