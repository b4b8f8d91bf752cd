"""TensorRT engines: plans built on this device beside the answers, run on a CUDA stream, ports fed as inputs.

**Not run by us on any GPU**: graphs, builder, cache, switch and fallback are tested; `PlanSession` is written after
NVIDIA's documentation. A switch needs answers like those of ONNX Runtime on this very device, else it does not happen.

Ports are graph inputs and not refitted weights: a change is a copy of two vectors, a plan serves every state, no second
context has to be kept, and the graph is the one that NVIDIA's builder accepts without a GPU (a refittable one needs a
driver even to be built). Which of the two answers faster on a board is not measured.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_adapt.bundle import FULL_INT8, Bundle
from edge_adapt.engines.building import Builder, Progress
from edge_adapt.engines.cache import PlanCache, PlanKey
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.engines.ported import ported
from edge_adapt.engines.ported_engine import PortedEngine
from edge_adapt.engines.switching import SwitchingEngine
from edge_adapt.engines.tensorrt_build import REMEDY, Shape, has_driver, library
from edge_adapt.engines.twin import Key
from edge_adapt.errors import EngineError

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]

MAX_BATCH = 16
BUFFERS = 4
"""Batch sizes whose buffers are kept."""
WORKSPACE_MB = (None, 512, 128)
"""Memory for tactics, by attempt: a build that ran out of memory is tried again with less."""


def profile_of(batch: int, max_batch: int) -> int:
    """Index of the profile: 0 for single frames, 1 for more, as `tensorrt_build.profiles` makes them."""
    return 0 if batch == 1 or max_batch == 1 else 1


def parts_of(frames: int, max_batch: int) -> list[slice]:
    """Frames of one call, in pieces that a plan takes."""
    return [slice(start, min(start + max_batch, frames)) for start in range(0, frames, max_batch)]


class PlanSession:
    """A plan with its buffers on the device. One call at a time."""

    def __init__(self, plan: bytes, frames: str, outputs: Sequence[str], max_batch: int) -> None:
        """
        Args:
            frames: the input whose first axis is the batch.
            outputs: their names, in the order that `run` gives them.
        Raises: EngineError if this TensorRT does not take the plan.
        """
        import torch

        trt = library()
        self._trt, self._frames, self._outputs, self._max_batch = trt, frames, list(outputs), max_batch
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError("TensorRT does not take its own plan", remedy="delete the cache of engines")
        self._stream = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call] # answers go before learning
        self._bound: dict[tuple[tuple[str, Shape], ...], _Bound] = {}
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        import torch

        count = len(feeds[self._frames])
        rest = {name: torch.from_numpy(value) for name, value in feeds.items() if name != self._frames}
        frames = torch.from_numpy(np.ascontiguousarray(feeds[self._frames]))
        made = [
            [tensor.cpu().numpy() for tensor in self.run_tensors({self._frames: frames[part], **rest})]
            for part in parts_of(count, self._max_batch)
        ]
        return [np.concatenate(pieces) for pieces in zip(*made, strict=True)]

    def run_tensors(self, feeds: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The same for tensors, at most `max_batch` frames: what is on the device already is not copied to the host.

        The outputs are the caller's. Raises: EngineError.
        """
        import torch

        shapes = tuple(sorted((name, tuple(value.shape)) for name, value in feeds.items()))
        with self._lock, torch.cuda.stream(self._stream):
            try:
                bound = self._bound.get(shapes)
                if bound is None:
                    if len(self._bound) >= BUFFERS:
                        self._bound.clear()
                    profile = profile_of(len(feeds[self._frames]), self._max_batch)
                    bound = self._bound[shapes] = _Bound(self._trt, self._engine, self._stream, dict(shapes), profile)
                made = bound.run(feeds, self._outputs)
                self._stream.synchronize()
            except RuntimeError as error:  # torch raises what CUDA says, out of memory included
                raise EngineError(f"CUDA failed: {str(error).splitlines()[0]}", remedy="see dmesg") from error
        return made

    def close(self) -> None:
        with self._lock:
            self._bound.clear()
            self._engine = None


class _Bound:
    """A context with buffers for one set of shapes, and its work as one CUDA graph."""

    def __init__(
        self, trt: Any, engine: Any, stream: torch.cuda.Stream, shapes: dict[str, Shape], profile: int
    ) -> None:
        import torch

        self._context = engine.create_execution_context()
        if self._context is None:
            raise EngineError("TensorRT has no memory for a context", remedy="use a smaller batch, or onnxruntime")
        self._context.set_optimization_profile_async(profile, stream.cuda_stream)
        self._buffers: dict[str, torch.Tensor] = {}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        for name in inputs:
            if not self._context.set_input_shape(name, shapes[name]):
                raise EngineError(f"the plan takes no {name} of shape {shapes[name]}", remedy="use a smaller batch")
        for name in (*inputs, *(name for name in names if name not in inputs)):
            shape = shapes[name] if name in inputs else tuple(self._context.get_tensor_shape(name))
            # An empty tensor has no address, and TensorRT wants one.
            memory = torch.zeros(max(1, int(np.prod(shape))), dtype=torch.float32, device="cuda")
            self._buffers[name] = memory[: int(np.prod(shape))].view(shape)
            self._context.set_tensor_address(name, memory.data_ptr())
        self._inputs = inputs
        self._enqueue(stream)  # once before the capture, as TensorRT asks
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may be learning on the same GPU meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._enqueue(stream)

    def run(self, feeds: Mapping[str, torch.Tensor], outputs: Sequence[str]) -> list[torch.Tensor]:
        for name in self._inputs:
            self._buffers[name].copy_(feeds[name], non_blocking=True)
        self._graph.replay()
        return [self._buffers[name].clone() for name in outputs]

    def _enqueue(self, stream: torch.cuda.Stream) -> None:
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EngineError("TensorRT could not begin", remedy="use the onnxruntime engine")


class PlanEngine(PortedEngine):
    """Plans from the cache, or built where this is called, which takes minutes."""

    name: ClassVar[str] = "tensorrt"

    def __init__(
        self, bundle: Bundle, builder: Builder, *, precision: str = "fp32", max_batch: int = MAX_BATCH
    ) -> None:
        super().__init__(bundle)
        self._builder, self._precision, self._max_batch = builder, precision, max_batch

    @classmethod
    def probe(cls) -> str | None:
        if not has_driver():
            return "no CUDA driver answers"
        try:
            library()
        except EngineError as error:
            return error.what
        import torch

        return None if torch.cuda.is_available() else f"torch {torch.__version__} was built without CUDA"

    @property
    def description(self) -> str:
        trt = library()
        return f"{trt.__name__} {trt.__version__}, {self._precision}, batches up to {self._max_batch}, ports are inputs"

    def _graph(self, key: Key) -> onnx.ModelProto:
        """Answers are INT8 where that is wanted; looks, from which methods learn, are float32 then."""
        if self._precision != "int8" or key[0] or key[1]:
            return super()._graph(key)
        return ported(onnx.load(self.bundle.path / FULL_INT8), self.bundle, key)

    def _session(self, graph: onnx.ModelProto) -> PlanSession:
        data = graph.SerializeToString()
        key = key_for(hashlib.sha256(data).hexdigest(), precision_of(graph, self._precision), self._max_batch)
        plan = self._builder.plan(key, lambda staged, attempt: command(data, key, staged, attempt))
        outputs = [info.name for info in graph.graph.output]
        return PlanSession(plan, graph.graph.input[0].name, outputs, self._max_batch)


class TensorRTEngine(SwitchingEngine):
    """ONNX Runtime answers until the plans are built; then they do, and ONNX Runtime again should they fail."""

    name: ClassVar[str] = "tensorrt"
    precision: ClassVar[str] = "fp32"
    tolerance: ClassVar[float] = 1e-3
    """Of random frames, at the switch: it shows a plan that is wrong, not how exact one is."""

    def __init__(self, bundle: Bundle, *, threads: int = 1, folder: Path | None = None) -> None:
        """Raises: EngineError, one sentence and the remedy, where TensorRT cannot run."""
        reason = self.probe()
        if reason is not None:
            raise EngineError(f"TensorRT cannot run here: {reason}", remedy=REMEDY)
        facts = bundle.manifest.quantised
        if self.precision == "int8" and (facts is None or facts.target != "tensorrt"):
            raise EngineError(
                f"bundle {bundle.manifest.name!r} has no INT8 graph for TensorRT",
                remedy="export it with `--precision int8 --target tensorrt`, or use tensorrt_fp16",
            )
        self._progress: Progress | None = None
        self._builder = Builder(PlanCache(folder), report=self._reported)
        # A CPU is faster with float32 than with the INT8 graph that TensorRT takes.
        first = OnnxRuntimeEngine(bundle, threads=threads, quantised=facts is not None and facts.target == "cpu")
        super().__init__(bundle, first, self._planned, tolerance=self.tolerance)

    @classmethod
    def probe(cls) -> str | None:
        return PlanEngine.probe()

    @property
    def description(self) -> str:
        if self.switched or self.trouble:
            return super().description
        return f"{super().description}; building {self.name}: {self._progress or 'begun'}"

    def close(self) -> None:
        self._builder.cancel()
        super().close()

    def _planned(self) -> PlanEngine:
        engine = PlanEngine(self.bundle, self._builder, precision=self.precision)
        engine.prepare()
        return engine

    def _reported(self, progress: Progress) -> None:
        self._progress = progress


class HalfTensorRTEngine(TensorRTEngine):
    """The same with halves as weights and activations."""

    name: ClassVar[str] = "tensorrt_fp16"
    precision: ClassVar[str] = "fp16"
    tolerance: ClassVar[float] = 2e-2


class Int8TensorRTEngine(TensorRTEngine):
    """Answers in INT8, of a bundle that was exported for it."""

    name: ClassVar[str] = "tensorrt_int8"
    precision: ClassVar[str] = "int8"
    tolerance: ClassVar[float] = 0.3


def precision_of(graph: onnx.ModelProto, wanted: str) -> str:
    """What a graph is built in: one without quantised parts cannot be INT8."""
    if wanted == "int8" and not any(node.op_type == "QuantizeLinear" for node in graph.graph.node):
        return "fp32"
    return wanted


def key_for(graph: str, precision: str, max_batch: int) -> PlanKey:
    """What a plan for this device depends on."""
    import torch

    trt, facts = library(), torch.cuda.get_device_properties(0)
    return PlanKey(
        graph, f"{trt.__name__} {trt.__version__}", facts.name, f"{facts.major}.{facts.minor}", precision, max_batch
    )


def command(graph: bytes, key: PlanKey, staged: Path, attempt: int) -> list[str]:
    """The program that builds; the graph is written beside what it makes. Raises: OSError."""
    path = staged.with_name(f"{staged.name}.onnx")
    path.write_bytes(graph)
    words = [sys.executable, "-m", "edge_adapt.engines.tensorrt_child", str(path), str(staged), json.dumps(asdict(key))]
    workspace = WORKSPACE_MB[min(attempt, len(WORKSPACE_MB) - 1)]
    return words if workspace is None else [*words, str(workspace)]
