"""A function with gradients inside, as one ONNX graph: traced once, then run without PyTorch.

`torch.func.grad` cannot be exported as it is. Traced down to single operations it can, once the backward pass of a
convolution is said in terms of other convolutions, which exporters know.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from edge_adapt.delta import write_atomically
from edge_adapt.engines.onnxruntime import CPU, session_options
from edge_adapt.errors import EngineError

Array = NDArray[Any]
aten = torch.ops.aten
log = logging.getLogger(__name__)
DIGEST = 32
"""Bytes before a graph in the cache."""


class CompiledStep:
    """Named arrays in, named arrays out."""

    def __init__(self, model: bytes, outputs: Sequence[str]) -> None:
        """Raises: EngineError if ONNX Runtime refuses the graph."""
        try:
            self._session = ort.InferenceSession(model, session_options(1), providers=[CPU])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise EngineError(
                f"ONNX Runtime refuses the step: {str(error).splitlines()[0]}", remedy="use `learner: eager`"
            ) from error
        self._inputs = {info.name for info in self._session.get_inputs()}
        self._outputs = tuple(outputs)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs that the function does not use were left out of the graph; they may be given all the same."""
        used = {name: value for name, value in feeds.items() if name in self._inputs}
        return dict(zip(self._outputs, self._session.run(None, used), strict=True))


def compiled(
    function: Callable[..., tuple[Tensor, ...]],
    examples: Mapping[str, Tensor],
    outputs: Sequence[str],
    *,
    key: str,
    cache: Path | None = None,
) -> CompiledStep:
    """Compile a function of tensors, or take it from the cache. Seconds the first time, shapes are fixed.

    Args:
        function: pure; positional tensors in the order of `examples`; gradients by `torch.func`.
        key: names everything that the function depends on.
        cache: folder for compiled graphs; None for the user's cache. Safe to delete.
    Raises: EngineError if it cannot be traced, exported or run.
    """
    folder = cache or default_cache()
    name = hashlib.sha256(f"{torch.__version__} {ort.__version__} {key}".encode()).hexdigest()[:24]
    path = folder / f"{name}.step"
    kept = _kept(path)
    if kept is not None:
        with contextlib.suppress(EngineError):
            return CompiledStep(kept, outputs)
    model = export_step(function, examples, outputs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.sha256(model).digest() + model)
    except OSError as error:
        log.info("the compiled step is not kept: %s", error)
    return CompiledStep(model, outputs)


def _kept(path: Path) -> bytes | None:
    """A graph behind its SHA-256; None if there is none, or it is damaged: one flipped bit may still be a graph."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, model = data[:DIGEST], data[DIGEST:]
    return model if hashlib.sha256(model).digest() == digest else None


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/edge-adapt/steps`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge-adapt" / "steps"


def export_step(
    function: Callable[..., tuple[Tensor, ...]], examples: Mapping[str, Tensor], outputs: Sequence[str]
) -> bytes:
    """Trace and export. Raises: EngineError naming what could not be."""
    table = {**core_aten_decompositions(), aten.convolution_backward.default: convolution_backward}
    given = tuple(examples.values())
    try:
        traced = make_fx(function, decomposition_table=table, tracing_mode="real")(*given).eval()
        traced.graph.eliminate_dead_code()
        traced.recompile()
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced,
                given,
                dynamo=True,
                input_names=list(examples),
                output_names=list(outputs),
                verbose=False,
            )
        assert program is not None
        model: onnx.ModelProto = program.model_proto
    except Exception as error:  # whatever tracing and exporting raise
        raise EngineError(
            f"the step cannot be compiled: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="use `learner: eager`",
        ) from error
    if [info.name for info in model.graph.output] != list(outputs):
        raise EngineError("the compiled step lacks outputs", remedy="use `learner: eager`")
    return bytes(model.SerializeToString())


def convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution for input, weight and bias, as convolutions.

    Input: the gradient with the weight turned round, or a transposed convolution where there are strides.
    Weight: the input with the gradient for a kernel, frames taking the place of channels.
    """
    if transposed or any(step != 1 for step in dilation):
        raise NotImplementedError("convolutions that are transposed or dilated")
    rank = x.ndim - 2
    sizes, axes = weight.shape[2:], tuple(range(2, x.ndim))
    to_input = to_weight = to_bias = None
    if wanted[0] and groups == 1 and all(step == 1 for step in stride):
        turned, margin = weight.flip(axes).transpose(0, 1), [k - 1 - p for k, p in zip(sizes, padding, strict=True)]
        to_input = aten.convolution(gradient, turned, None, [1] * rank, margin, dilation, False, [0] * rank, 1)
    elif wanted[0]:
        rest = [
            x.shape[2 + i] - ((gradient.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + sizes[i]) for i in range(rank)
        ]
        to_input = aten.convolution(gradient, weight, None, stride, padding, dilation, True, rest, groups)
    if wanted[1]:
        count, channels, size = *x.shape[:2], x.shape[2:]
        apart = x.reshape(count, groups, channels // groups, *size).transpose(0, 2)
        apart = apart.reshape(channels // groups, groups * count, *size)
        kernel = gradient.transpose(0, 1)
        made = aten.convolution(apart, kernel, None, dilation, padding, stride, False, [0] * rank, groups)
        for axis, length in zip(axes, sizes, strict=True):
            made = made.narrow(axis, 0, length)
        to_weight = made.transpose(0, 1)
    if wanted[2]:
        to_bias = gradient.sum((0, *axes))
    return to_input, to_weight, to_bias
