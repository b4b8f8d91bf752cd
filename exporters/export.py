"""One export, from a model to a bundle that passed its gate. A bundle that fails, or is interrupted, is not written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from edge_adapt.bundle import (
    FULL,
    FULL_INT8,
    INPUT_CUT,
    MANIFEST,
    Bundle,
    Cut,
    Head,
    InputSpec,
    Manifest,
    Parity,
    Quantised,
    Site,
)
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.engines.quantised import quantised_layers
from edge_adapt.engines.torch_from_onnx import GraphModule
from edge_adapt.errors import ArtifactError, ConfigError, DataError
from edge_adapt.graph import SIDE, attributes, graft_taps, initializers, producers, shapes
from edge_adapt.preprocess import Preprocess
from exporters import parity
from exporters.accuracy import accuracy_entries, can_be_fitted
from exporters.adapters import write_label_shift, write_pairs
from exporters.calibrate import source_statistics
from exporters.cut import resolve_cut, tail_of
from exporters.onnx_from_torch import OPSET
from exporters.passes import without_traces
from exporters.quantise import QuantisePlan, check_calibration, compare, gate, quantise, split
from exporters.sites import Folded, conv_outputs_without_norm, fold, insert_norms
from exporters.sources import Model, from_module, from_spec
from exporters.training_state import place_of
from exporters.warm_up import WarmUpPlan, with_weights
from exporters.warm_up import warm_up as run_warm_up
from exporters.writing import aside, finish, save_graphs

__all__ = ["Model", "check", "export", "from_module", "from_spec"]

Array = NDArray[Any]
Report = Callable[[str], None]
Progress = Callable[[str, int, int], None]

PARITY_SAMPLES = 32
CALIBRATION_SAMPLES = 2000
BATCH = 50
FULL_TAP_SHARE = 0.01
"""Values read per multiply-add up to which taps look at every position: ResNets have 0.005, mobile nets 0.02."""


def export(
    model: Model,
    out: Path,
    *,
    calibration: Array | None = None,
    cut: str | None = None,
    warm_up: WarmUpPlan | None = None,
    estimate: bool = False,
    int8: QuantisePlan | None = None,
    force: bool = False,
    report: Report = lambda text: None,
    progress: Progress = lambda what, done, total: None,
) -> Path:
    """Write a bundle.

    Args:
        calibration: raw source frames, as in an archive; None computes what it can from the model alone.
        cut: module or tensor where the trunk ends, `input` for reference mode, None for the model's default.
        warm_up: labelled source images to train on first; an interrupted training goes on when called again.
        estimate: fit the estimate of accuracy without labels too, on augmented calibration frames; it takes a minute.
        int8: answer with an INT8 graph; needs calibration frames, and compares with float32 on some of them.
        force: replace an existing bundle, and write one whose INT8 graph loses more than it may.
        report: told one line per stage.
        progress: told (what, steps done, steps in all).
    Raises: EdgeAdaptError. Nothing is left behind.
    """
    if out.exists() and not (force and (out / MANIFEST).exists()):
        raise ConfigError(
            f"{out} exists", remedy="choose another folder" if not (out / MANIFEST).exists() else "add --force"
        )
    if int8 is not None:
        check_calibration(calibration)
    frames = _calibration_frames(model.input, calibration)
    with aside(out) as folder:
        report("finding norm sites")
        network = _with_norms(model.network, frames)
        warmed = None
        if warm_up is not None:
            warmed = run_warm_up(
                network, model.input, warm_up, checkpoint=place_of(out), report=report, progress=progress
            )
            model = replace(model, module=with_weights(model.module, network, warmed.network))
            network = warmed.network
        tensor = resolve_cut(network, cut or model.cut)
        folded = fold(network)
        manifest = _manifest(model, network, folded, tensor, cut or model.cut)
        if warmed is not None:
            manifest = manifest.model_copy(update={"warm_up": warmed.record})
        report(f"{len(folded.sites)} norm sites, cut at {manifest.cut.name}")
        save_graphs(folder, network, folded, manifest)
        report("measuring the source domain" if frames is not None else "no calibration data: stored statistics")
        source = folded.constants | _head_weights(folded.model, manifest.head)
        manifest = finish(folder, manifest, source)
        bundle = Bundle.load(folder)
        if int8 is not None and frames is not None:
            manifest = _with_int8(folder, bundle, source, frames, int8, force, report)
            bundle = Bundle.load(folder)
        engine = OnnxRuntimeEngine(bundle)
        if frames is not None:
            source |= source_statistics(bundle, engine, frames, lambda count: None)
            if estimate:
                source |= _accuracy(replace(bundle, source=source), engine, calibration, report, progress)
        if warmed is not None and warm_up is not None:
            report("training the adapters")
            source |= warmed.source
            write_pairs(bundle, warmed.frozen, warmed.low, warmed.high)
            _write_label_shift(bundle, engine, warm_up, report)
        report("parity gate")
        torch_model = model.module
        if torch_model is None or not _names_match(torch_model, folded.sites):
            torch_model = GraphModule(network).eval()
        samples = _parity_frames(model.input, frames)
        engine.close()
        engine = OnnxRuntimeEngine(bundle, quantised=False)
        errors = parity.measure(bundle, engine, torch_model, samples)
        parity.gate(errors)
        engine.close()
        checked = Parity(
            samples=len(samples),
            data="random" if frames is None else "calibration",
            tolerance=parity.TOLERANCE,
            **errors,
        )
        count = 0 if frames is None else len(frames)
        finish(folder, manifest.model_copy(update={"parity": checked, "calibration_samples": count}), source)
        report(f"parity {max(errors.values()):.1e} of the output's scale, {parity.TOLERANCE:.0e} allowed")
    place_of(out).unlink(missing_ok=True)
    return out


def _with_int8(
    folder: Path,
    bundle: Bundle,
    source: dict[str, Array],
    frames: Array,
    plan: QuantisePlan,
    force: bool,
    report: Report,
) -> Manifest:
    """Put an INT8 graph into a bundle. Raises: ArtifactError if it loses more than it may, unless forced."""
    report(f"INT8 for {plan.target}")
    measured, held_out = split(frames)
    graph = quantise(bundle, measured, plan.target)
    (folder / FULL_INT8).write_bytes(without_traces(graph).SerializeToString())
    facts = Quantised(
        target=plan.target,
        frames=len(measured),
        held_out=len(held_out),
        agreement=(0, 0),
        speed=0,
        layers=len(quantised_layers(graph, bundle)),
    )
    manifest = bundle.manifest.model_copy(update={"precision": "int8", "quantised": facts})
    manifest = finish(folder, manifest, source)
    labels = None if plan.labels is None else split(_spread(plan.labels))[1]
    facts = compare(Bundle.load(folder), held_out, labels)
    report(f"INT8: {facts.agreement[0]:g} % of the answers as in float32, {facts.speed:g} times as fast")
    wrong = gate(facts, plan.max_loss)
    if wrong is not None and not force:
        raise ArtifactError(wrong, remedy="calibrate with more frames, use fp32, or add --force")
    if wrong is not None:
        report(f"forced: {wrong}")
    return finish(folder, manifest.model_copy(update={"quantised": facts}), source)


def _accuracy(
    bundle: Bundle, engine: OnnxRuntimeEngine, images: Array | None, report: Report, progress: Progress
) -> dict[str, Array]:
    """What accuracy can be told by without labels, where the frames are images and enough."""
    if images is None or not can_be_fitted(bundle, images):
        return {}
    report("fitting the estimate of accuracy")
    return accuracy_entries(
        bundle, engine, _spread(images), lambda done, total: progress("estimate of accuracy", done, total)
    )


def _write_label_shift(bundle: Bundle, engine: OnnxRuntimeEngine, plan: WarmUpPlan, report: Report) -> None:
    assert plan.data.images is not None and plan.data.labels is not None
    try:
        write_label_shift(bundle, engine, plan.data.images, plan.data.labels, plan.settings.seed)
    except DataError as error:
        report(f"no label shift adapter: {error.what}")


def check(path: Path, report: Report = lambda text: None) -> dict[str, float]:
    """Verify a bundle: hashes, schema, and parity of engine, trunk and tail again. Raises: ArtifactError.

    The torch side is rebuilt from full.onnx, whose norms are folded, so the ports are compared through the tail and
    through a rebuilt session.
    """
    bundle = Bundle.load(path)
    report("hashes and schema")
    engine = OnnxRuntimeEngine(bundle, quantised=False)
    rebuilt = OnnxRuntimeEngine(bundle, live=False, quantised=False)
    frames = _parity_frames(bundle.manifest.input, None)
    reference = GraphModule(onnx.load(path / FULL)).eval()
    prompts = [torch.zeros(0, bundle.manifest.prompts)] if bundle.manifest.prompts else []
    with torch.no_grad():
        expected = reference(torch.from_numpy(frames), *prompts).numpy()
    errors = {"engine": parity.distance(engine.run(frames), expected)}
    errors |= parity.compare_engines(bundle, engine, rebuilt, frames)
    report("parity")
    parity.gate(errors)
    return errors


def _with_norms(network: onnx.ModelProto, frames: Array | None) -> onnx.ModelProto:
    """A graph without any norm gets one that changes nothing behind each convolution, from measured moments."""
    tensors = conv_outputs_without_norm(network)
    if not tensors or frames is None:
        return network
    import onnxruntime as ort

    session = ort.InferenceSession(
        graft_taps(network, tensors).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    image = network.graph.input[0].name
    taps = np.concatenate(
        [session.run(["taps"], {image: frames[start : start + BATCH]})[0] for start in range(0, len(frames), BATCH)]
    ).astype(np.float64)
    mean, second = taps.mean(axis=0)
    std = np.sqrt(np.maximum(second - np.square(mean), 1e-8))
    weights, producers = initializers(network.graph), {node.output[0]: node for node in network.graph.node}
    moments, start = {}, 0
    for tensor in tensors:
        width = weights[producers[tensor].input[1]].shape[0]
        moments[tensor] = (mean[start : start + width], std[start : start + width])
        start += width
    return insert_norms(network, moments)


def _manifest(
    model: Model, network: onnx.ModelProto, folded: Folded, tensor: str, cut: str | None
) -> Manifest:
    dims = shapes(folded.model)
    if tensor not in dims:
        raise ConfigError(
            f"the cut {cut!r} lies between a layer and the norm that is folded into it", remedy="cut behind the norm"
        )
    tail = tail_of(network, tensor, None)
    inside = {node.name for node in tail.graph.node}
    sites = tuple(site.model_copy(update={"in_tail": site.name in inside}) for site in folded.sites)
    reference = tensor == network.graph.input[0].name
    name = INPUT_CUT if reference else (cut or tensor)
    last = network.graph.node[-1]
    prompts = network.graph.input[1].type.tensor_type.shape.dim[1].dim_value if len(network.graph.input) > 1 else None
    return Manifest(
        name=model.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        input=model.input,
        classes=model.classes,
        output="probabilities" if last.op_type == "Softmax" else "logits",
        outputs=int(shapes(network)[network.graph.output[0].name][-1] or 0),
        cut=Cut(name=name, tensor=tensor, shape=tuple(dim for dim in dims[tensor][1:] if isinstance(dim, int))),
        head=_head(folded.model, dims),
        sites=sites,
        layers=tuple(folded.layers),
        tap_side=_tap_side(folded, dims),
        prompts=prompts or None,
        opset=OPSET,
        parity=Parity(samples=0, data="random", tolerance=0, identity_ports=0, random_ports=0, tail=0),
        provenance={**model.provenance, "onnx": onnx.__version__},
        files={},
    )


def _head(model: onnx.ModelProto, dims: dict[str, list[int | str | None]]) -> Head | None:
    """The last layer, if it is linear."""
    made_by, weights = producers(model.graph), initializers(model.graph)
    node = made_by[model.graph.output[0].name]
    while node.op_type in ("Softmax", "LogSoftmax"):
        node = made_by[node.input[0]]
    if node.op_type != "Gemm" or node.input[1] not in weights:
        return None
    return Head(layer=node.name, features=node.input[0], width=int(dims[node.input[0]][-1] or 0))


def _head_weights(model: onnx.ModelProto, head: Head | None) -> dict[str, Array]:
    """`head.weight` [K, D] and `head.bias` [K]."""
    if head is None:
        return {}
    node = next(node for node in model.graph.node if node.name == head.layer)
    weights, facts = initializers(model.graph), attributes(node)
    weight = weights[node.input[1]] if facts.get("transB") else weights[node.input[1]].T
    bias = weights[node.input[2]] if len(node.input) > 2 and node.input[2] else np.zeros(len(weight))
    return {"head.weight": weight * facts.get("alpha", 1.0), "head.bias": bias * facts.get("beta", 1.0)}


def _tap_side(folded: Folded, dims: dict[str, list[int | str | None]]) -> int:
    """All positions where reading them is little beside the work of the convolutions, else a sample."""
    weights = initializers(folded.model.graph)
    layers = {layer.name: layer for layer in folded.layers}
    read = work = 0.0
    for node in folded.model.graph.node:
        if node.name in layers and node.op_type == "Conv":
            positions = prod(dim for dim in dims[node.output[0]][2:] if isinstance(dim, int))
            work += positions * weights[node.input[1]].size
    for site in folded.sites:
        read += site.channels * prod(dim for dim in dims[site.tensor][2:] if isinstance(dim, int))
    return 0 if read < FULL_TAP_SHARE * work else SIDE


def _calibration_frames(spec: InputSpec, images: Array | None) -> Array | None:
    if images is None:
        return None
    if not len(images):
        raise DataError("the calibration data is empty", remedy="give some source frames")
    if np.issubdtype(images.dtype, np.floating) and not np.isfinite(images).all():
        raise DataError("the calibration data holds NaN or infinite values", remedy="remove those frames")
    return Preprocess(spec)(_spread(images))


def _spread(images: Array) -> Array:
    """As many as are calibrated with, from all places of the data."""
    step = max(1, len(images) // CALIBRATION_SAMPLES)
    return images[::step][:CALIBRATION_SAMPLES]


def _parity_frames(spec: InputSpec, frames: Array | None) -> Array:
    if frames is not None:
        return frames[:PARITY_SAMPLES]
    return np.random.default_rng(0).standard_normal((8, *spec.shape), np.float32)


def _names_match(module: nn.Module, sites: Sequence[Site]) -> bool:
    """True if every site is a norm module of the torch model, so that it can be compared with ports moved."""
    known = dict(module.named_modules())
    return all(
        hasattr(known.get(site.name), "running_var" if site.kind == "batch_norm" else "weight") for site in sites
    )
