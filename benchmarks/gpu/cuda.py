"""PyTorch on a GPU: the whole network with and without a CUDA graph, answers beside learning, and no memory left.

**Not run yet**: no GPU was at hand. Where there is none, each part says so.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks.device import BATCHES, LESSON, random_ports, timed
from edge_adapt.bundle import FULL, Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.engines.torch_from_onnx import GraphModule
from edge_adapt.far import FarTail

NO_GPU = "torch finds no GPU"
LITTLE_MB = 8.0
"""Far less than any tail takes."""


def _skipped(name: str) -> dict[str, Any] | None:
    return None if torch.cuda.is_available() else {"name": name, "status": "skipped", "why": NO_GPU}


def network(bundle: Bundle, *, rounds: int, graphs: bool) -> dict[str, Any]:
    """Milliseconds of full.onnx as a torch module, host to host; with `graphs` recorded once and replayed."""
    name = "torch, CUDA graph" if graphs else "torch on cuda"
    skipped = _skipped(name)
    if skipped is not None:
        return skipped
    module = GraphModule(onnx.load(bundle.path / FULL)).eval().cuda()
    found: dict[str, Any] = {}
    for size in BATCHES:
        frames = torch.randn(size, *bundle.manifest.input.shape).pin_memory()
        prompts = [torch.zeros(0, bundle.manifest.prompts, device="cuda")] if bundle.manifest.prompts else []
        still = torch.zeros_like(frames, device="cuda")
        with torch.inference_mode():
            run = _recorded(module, still, prompts) if graphs else (lambda: module(still, *prompts))  # noqa: B023

            def call(number: int) -> torch.Tensor:
                still.copy_(frames, non_blocking=True)  # noqa: B023
                made: torch.Tensor = run().cpu()  # noqa: B023
                return made

            found[str(size)] = timed(call, rounds)
    text = ", ".join(f"{each['p50_ms']:.3f} ms for {size} (p99 {each['p99_ms']:.3f})" for size, each in found.items())
    return {"name": name, "status": "ok", "batches": found, "text": text}


def _recorded(module: torch.nn.Module, still: torch.Tensor, prompts: list[torch.Tensor]) -> Any:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(still, *prompts)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = module(still, *prompts)

    def run() -> torch.Tensor:
        graph.replay()
        answer: torch.Tensor = made
        return answer

    return run


def beside(bundle: Bundle, *, rounds: int) -> dict[str, Any]:
    """p99 of answers on the GPU alone, and while the tail learns without a pause in another thread."""
    name = "answers beside learning"
    skipped = _skipped(name)
    if skipped is not None:
        return skipped
    module = GraphModule(onnx.load(bundle.path / FULL)).eval().cuda()
    frame = torch.randn(1, *bundle.manifest.input.shape, device="cuda")
    prompts = [torch.zeros(0, bundle.manifest.prompts, device="cuda")] if bundle.manifest.prompts else []
    stream = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]

    def answer(number: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(stream):
            module(frame, *prompts).cpu()

    alone = timed(answer, rounds)
    done = threading.Event()
    learner = threading.Thread(target=_learn, args=(bundle, done), daemon=True)
    learner.start()
    try:
        both = timed(answer, rounds)
    finally:
        done.set()
        learner.join()
    text = f"p99 {alone['p99_ms']:.3f} ms alone, {both['p99_ms']:.3f} ms beside learning"
    return {"name": name, "status": "ok", "alone": alone, "beside": both, "text": text}


def _learn(bundle: Bundle, done: threading.Event) -> None:
    tail = FarTail(bundle)
    cut, ports = _cut(bundle), random_ports(bundle, 0)
    while not done.is_set():
        values = {name: value.clone().requires_grad_() for name, value in tail.norm_parameters.items()}
        tail(cut, values, ports=ports).softmax(1).square().sum().backward()  # type: ignore[no-untyped-call]


def _cut(bundle: Bundle) -> torch.Tensor:
    engine = OnnxRuntimeEngine(bundle, quantised=False)
    frames = np.random.default_rng(0).standard_normal((LESSON, *bundle.manifest.input.shape), np.float32)
    cut = engine.observe(frames, cut=True).cut
    engine.close()
    assert cut is not None
    return torch.tensor(cut)


def out_of_memory(bundle: Bundle) -> dict[str, Any]:
    """With hardly any memory the tail must raise torch.OutOfMemoryError, and answer again once there is some."""
    name = "GPU out of memory"
    skipped = _skipped(name)
    if skipped is not None:
        return skipped
    tail, cut = FarTail(bundle, memory_mb=LITTLE_MB), _cut(bundle)
    many = cut.repeat(256, *(1,) * (cut.ndim - 1))
    try:
        tail(many)
        raised = False
    except torch.OutOfMemoryError:
        raised = True
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    again = bool(torch.isfinite(tail(cut)).all())
    return {
        "name": name,
        "status": "ok" if raised and again else "failed",
        "why": f"raised: {raised}, answered after it: {again}",
        "text": f"raised: {raised}, answered after it: {again}",
    }
