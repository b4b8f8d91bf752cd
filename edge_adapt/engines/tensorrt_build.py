"""ONNX -> TensorRT plan, with whichever TensorRT is here; as a process of its own it builds a plan for the cache.

TensorRT proper builds on the board it runs on, and needs its driver. TensorRT for RTX builds ahead of time without a
GPU: such a plan is a proof that NVIDIA's parser and builder take the graph, and is never run or kept. Both have one
interface; nothing here is imported by anything that does not build.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from edge_adapt.engines.halves import in_halves
from edge_adapt.errors import EngineError

CLASSIC, RTX = "tensorrt", "tensorrt_rtx"
PRECISIONS = ("fp32", "fp16", "int8")
MAX_PROMPTS = 8
REMEDY = (
    "on an NVIDIA board use the TensorRT that comes with its system; to only check graphs, on any machine, "
    "`pip install tensorrt-rtx-cu13`"
)
Progress = Callable[[str, int, int], None]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Refusal:
    """Why a graph was not taken."""

    node: str | None
    """The first node that was refused, where it can be told."""
    operator: str | None
    reason: str

    def __str__(self) -> str:
        where = f"node {self.node!r} ({self.operator}): " if self.node else ""
        return where + self.reason


class RefusedError(EngineError):
    """The parser or the builder does not take the graph; another try would not either."""

    def __init__(self, what: str, refusal: Refusal) -> None:
        super().__init__(f"{what}: {refusal}", remedy="leave that operation out of the model, or use onnxruntime")
        self.refusal = refusal


@dataclass(frozen=True)
class Profile:
    """Smallest, best and largest shape of each input that has more than one."""

    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


def has_driver() -> bool:
    """True where a CUDA driver answers. Asked first: parts of TensorRT crash the process without one."""
    try:
        return bool(ctypes.CDLL("libcuda.so.1").cuInit(0) == 0)
    except (OSError, AttributeError):
        return False


def library() -> Any:
    """The TensorRT that builds here. Raises: EngineError, one sentence, with the remedy."""
    wanted = (CLASSIC, RTX) if has_driver() else (RTX,)
    for name in wanted:
        try:
            found = importlib.import_module(name)
        except (ImportError, OSError):  # a binding without its shared library says either
            continue
        if hasattr(found, "Builder"):
            return found
    raise EngineError("no TensorRT builder can be had on this machine", remedy=REMEDY)


def profiles(inputs: Mapping[str, Shape], max_batch: int) -> list[Profile]:
    """One profile for single frames, one for batches up to `max_batch`; pure.

    Args:
        inputs: name -> shape, -1 where dynamic. The first is the frames, others with a dynamic length are prompts.
    """
    frames = next(iter(inputs), None)
    made = []
    for batch in sorted({1, max_batch}):
        shapes = {
            name: tuple(
                tuple(size if dim == -1 else dim for dim in shape)
                for size in ((1, batch, batch) if name == frames else (0, 0, MAX_PROMPTS))
            )
            for name, shape in inputs.items()
            if -1 in shape
        }
        made.append(Profile(shapes))  # type: ignore[arg-type]
    return made


def flags_of(precision: str, known: Sequence[str]) -> tuple[list[str], list[str]]:
    """Builder flags to set and to clear; those that this TensorRT lacks are left out, it takes types from the graph.

    TF32 keeps ten bits of a float's fraction: full precision means without it.
    """
    wanted = {"fp32": [], "fp16": ["FP16"], "int8": ["INT8", "FP16"]}[precision]
    return [name for name in wanted if name in known], [name for name in ("TF32",) if name in known]


def in_precision(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The graph as it is built: every TensorRT takes the types that the graph says. An int8 graph is one already."""
    return in_halves(model) if precision == "fp16" else model


def build(
    model: onnx.ModelProto,
    *,
    precision: str = "fp32",
    max_batch: int = 16,
    workspace_mb: int | None = None,
    progress: Progress | None = None,
) -> bytes:
    """A serialised plan.

    Args:
        model: float graph, or QDQ graph for `int8`; dynamic batch.
        workspace_mb: memory that tactics may use; None: what the device has.
        progress: told (phase, steps done, steps in all), where this TensorRT tells.
    Raises: RefusedError if the graph is not taken; EngineError if there is no builder.
    """
    trt = library()
    messages: list[str] = []
    logger = _logger(trt, messages)
    builder = trt.Builder(logger)
    creation = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if creation is None else 1 << int(creation))
    if not getattr(builder, f"platform_has_fast_{precision}", True):
        raise EngineError(f"this GPU has no fast {precision}", remedy="use fp32")
    parser = trt.OnnxParser(network, logger)
    ready = in_precision(model, precision)
    if not parser.parse(ready.SerializeToString()):
        raise RefusedError("TensorRT's parser refuses the graph", _parsed(parser, ready, messages))
    config = builder.create_builder_config()
    _configure(trt, config, precision, workspace_mb)
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    for profile in profiles(inputs, max_batch):
        made = builder.create_optimization_profile()
        for name, shapes in profile.shapes.items():
            made.set_shape(name, *shapes)
        config.add_optimization_profile(made)
    monitor = _monitor(trt, progress) if progress is not None else None
    if monitor is not None:
        config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RefusedError("TensorRT's builder refuses the graph", _built(ready, messages))
    return bytes(plan)


def _configure(trt: Any, config: Any, precision: str, workspace_mb: int | None) -> None:
    known = list(trt.BuilderFlag.__members__)
    wanted, unwanted = flags_of(precision, known)
    for name in wanted:
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in unwanted:
        config.clear_flag(getattr(trt.BuilderFlag, name))
    if workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    if not has_driver():  # only TensorRT for RTX gets here; some target must be named without a GPU to ask
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)


def _parsed(parser: Any, model: onnx.ModelProto, messages: list[str]) -> Refusal:
    if not parser.num_errors:
        return Refusal(None, None, messages[0] if messages else "no reason given")
    error = parser.get_error(0)
    node = model.graph.node[error.node()] if 0 <= error.node() < len(model.graph.node) else None
    return Refusal(node.name if node else None, node.op_type if node else None, " ".join(error.desc().split()))


def _built(model: onnx.ModelProto, messages: list[str]) -> Refusal:
    text = " ".join((messages[0] if messages else "no reason given").split())
    named = [node for node in model.graph.node if node.name and node.name in text]
    first = max(named, key=lambda node: len(node.name), default=None)
    return Refusal(first.name if first else None, first.op_type if first else None, text)


def _logger(trt: Any, messages: list[str]) -> Any:
    """Keeps errors instead of printing them: the builder gives its reasons nowhere else."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(text)

    return Logger()


def _monitor(trt: Any, progress: Progress) -> Any | None:
    """Tells the steps of the outermost phase; None where this TensorRT has no such thing."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps:
                progress(phase, step + 1, self.steps[phase])
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()
