"""Would TensorRT take every graph of a bundle? Its real parser and builder are asked; nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx

from edge_adapt.bundle import FULL, FULL_INT8, TRUNK, Bundle
from edge_adapt.engines.ported import ported, without_defaults
from edge_adapt.engines.tensorrt_build import RTX, RefusedError, build, library
from edge_adapt.errors import ArtifactError

Report = Callable[[str], None]
FLOAT = ("fp32", "fp16")


@dataclass(frozen=True)
class Verdict:
    """About one graph in one precision."""

    graph: str
    precision: str
    plan_bytes: int | None
    """None: it was refused."""
    refused: RefusedError | None = None


def graphs(bundle: Bundle) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Every float graph that an engine could be built of, with what it is called in a report."""
    full = onnx.load(bundle.path / FULL)
    features = bundle.manifest.head is not None
    yield "full", full
    yield "full with ports", ported(full, bundle, (False, False, features))
    if bundle.manifest.sites:
        yield "full with ports and taps", ported(full, bundle, (not bundle.is_reference, True, features))
    if not bundle.is_reference:
        yield "trunk with ports and taps", without_defaults(onnx.load(bundle.path / TRUNK))


def int8_graphs(bundle: Bundle) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The same in INT8, where the bundle has it for TensorRT; what is fast on a CPU is refused, and not asked for."""
    facts = bundle.manifest.quantised
    if facts is not None and facts.target == "tensorrt":
        model = onnx.load(bundle.path / FULL_INT8)
        yield "full", model
        yield "full with ports", ported(model, bundle, (False, False, bundle.manifest.head is not None))


def verdicts(bundle: Bundle, precisions: tuple[str, ...] = FLOAT) -> Iterator[Verdict]:
    """One for each float graph and precision, and each INT8 graph. Raises: EngineError if there is no builder here."""
    library()
    asked = [(name, model, precision) for name, model in graphs(bundle) for precision in precisions]
    asked += [(name, model, "int8") for name, model in int8_graphs(bundle)]
    for name, model, precision in asked:
        try:
            yield Verdict(name, precision, len(build(model, precision=precision)))
        except RefusedError as error:
            yield Verdict(name, precision, None, error)


def check(bundle: Bundle, report: Report, precisions: tuple[str, ...] = FLOAT) -> int:
    """Number of plans that were built, all of them.

    Raises: EngineError if there is no builder here; ArtifactError naming the first graph and node that are refused.
    """
    trt = library()
    asked = f"{trt.__name__} {trt.__version__}"
    found = []
    for verdict in verdicts(bundle, precisions):
        what = f"{verdict.graph}, {verdict.precision}"
        if verdict.refused is not None:
            raise ArtifactError(f"{asked}: {what}: {verdict.refused.what}", remedy=verdict.refused.remedy)
        report(f"{what}: accepted, {(verdict.plan_bytes or 0) / 1e6:.1f} MB")
        found.append(verdict)
    suffix = "; this says that its parser and builder take them, not how they run" if trt.__name__ == RTX else ""
    facts = bundle.manifest.quantised
    if facts is not None and facts.target != "tensorrt":
        report(f"full, int8: not asked, it was made for {facts.target}; export with --target tensorrt")
    report(f"{len(found)} plans built by {asked}{suffix}")
    return len(found)
