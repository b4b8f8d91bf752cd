"""Rebuild a torch module from an ONNX graph: the tail of every bundle, and the whole of the reference engine.

Parameters keep their names (`layer3.0.bn1.weight`), so that a method addresses them as in the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

from edge_adapt.errors import ArtifactError

Op = Callable[..., Any]
LAYERS = ("Conv", "Gemm", "MatMul", "BatchNormalization", "LayerNormalization")
DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.DOUBLE: torch.float64,
}


class GraphModule(nn.Module):
    """An ONNX graph as a torch module. Inputs and outputs are positional, in the order of the graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = model.graph
        self.inputs = [info.name for info in graph.input]
        self.outputs = [info.name for info in graph.output]
        layers = [node for node in graph.node if node.op_type in LAYERS]
        parameters = {name for node in layers for name in node.input[1:3]}
        statistics = {name for node in layers for name in node.input[3:5]}
        self.constants: dict[str, Any] = {}
        self.places: dict[str, str] = {}
        for tensor in graph.initializer:
            value = numpy_helper.to_array(tensor).copy()
            if tensor.name in parameters | statistics:
                buffer = tensor.name in statistics
                self.places[tensor.name] = _register(self, tensor.name, torch.from_numpy(value), buffer=buffer)
            elif value.ndim == 0 or (value.ndim == 1 and value.dtype == np.int64):
                self.constants[tensor.name] = value.tolist()  # bounds, axes, shapes: Python numbers
            else:
                self.places[tensor.name] = _register(self, tensor.name, torch.from_numpy(value), buffer=True)
        self.steps = [_Step(node) for node in graph.node]

    def forward(self, *inputs: Tensor) -> Any:
        """The outputs of the graph: one tensor, or a tuple."""
        values: dict[str, Any] = dict(self.constants)
        values |= {name: _lookup(self, place) for name, place in self.places.items()}
        values |= dict(zip(self.inputs, inputs, strict=True))
        for step in self.steps:
            made = step.op(*(values[name] if name else None for name in step.inputs), **step.attributes)
            if isinstance(made, tuple):
                values |= dict(zip(step.outputs, made, strict=False))
            else:
                values[step.outputs[0]] = made
        found = tuple(values[name] for name in self.outputs)
        return found[0] if len(found) == 1 else found


class _Step:
    """One node: its function, and the names it reads and writes."""

    def __init__(self, node: onnx.NodeProto) -> None:
        op = OPS.get(node.op_type)
        if op is None:
            raise ArtifactError(
                f"operator {node.op_type} (node {node.name!r}) has no torch counterpart here",
                remedy="move the cut behind it, so that it stays in the engine",
            )
        self.op = op
        self.inputs, self.outputs = list(node.input), list(node.output)
        self.attributes = {
            attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute
        }


def _register(root: nn.Module, name: str, value: Tensor, *, buffer: bool) -> str:
    """Store a parameter under its dotted name, in nested modules, as torch names allow."""
    *path, leaf = [part or "_" for part in name.replace("/", "_").replace(":", "_").split(".")]
    module = root
    for part in path:
        key = f"{part}_" if hasattr(nn.Module, part) else part
        if key not in module._modules:
            module.add_module(key, nn.Module())
        child = module._modules[key]
        assert child is not None
        module = child
    if buffer:
        module.register_buffer(leaf, value)
    else:
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    keys = [f"{part}_" if hasattr(nn.Module, part) else part for part in path]
    return ".".join([*keys, leaf])


def _lookup(root: nn.Module, place: str) -> Any:
    module: Any = root
    for part in place.split("."):
        module = getattr(module, part)
    return module


def _ints(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        value = value.tolist()
    return [value] if isinstance(value, int) else [int(item) for item in value]


def _padded(x: Tensor, pads: Sequence[int] | None, value: float = 0.0) -> tuple[Tensor, list[int]]:
    """Symmetric padding is left to the operator; anything else is done here."""
    rank = x.ndim - 2
    pads = list(pads or [0] * (2 * rank))
    before, after = pads[:rank], pads[rank:]
    if before == after:
        return x, before
    flat = [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]
    return F.pad(x, flat, value=value), [0] * rank


def _auto_pads(x: Tensor, kernel: Sequence[int], stride: Sequence[int], mode: bytes) -> list[int] | None:
    """Explicit pads for TensorFlow's "same" padding."""
    if mode in (b"NOTSET", b"VALID", b""):
        return None
    before, after = [], []
    for size, width, step in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((-(-int(size) // step) - 1) * step + width - int(size), 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == b"SAME_UPPER" else large)
        after.append(large if mode == b"SAME_UPPER" else small)
    return before + after


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **facts: Any) -> Tensor:
    rank = x.ndim - 2
    stride = facts.get("strides", [1] * rank)
    pads = _auto_pads(x, weight.shape[2:], stride, facts.get("auto_pad", b"NOTSET")) or facts.get("pads")
    x, padding = _padded(x, pads)
    run: Op = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    dilation, group = facts.get("dilations", [1] * rank), facts.get("group", 1)
    made: Tensor = run(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=group)
    return made


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, **facts: Any) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, False, 0.1, facts.get("epsilon", 1e-5))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, **facts: Any) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, facts.get("epsilon", 1e-5))


def gemm(a: Tensor, b: Tensor, c: Tensor | None = None, **facts: Any) -> Tensor:
    a = a.mT if facts.get("transA", 0) else a
    plain = facts.get("alpha", 1.0) == facts.get("beta", 1.0) == 1.0
    if plain and facts.get("transB", 0) and (c is None or c.ndim == 1):
        return F.linear(a, b, c)
    made: Tensor = facts.get("alpha", 1.0) * (a @ (b.mT if facts.get("transB", 0) else b))
    return made if c is None else made + facts.get("beta", 1.0) * c


def pool(x: Tensor, *, largest: bool, **facts: Any) -> Tensor:
    rank = x.ndim - 2
    kernel = facts["kernel_shape"]
    stride = facts.get("strides", [1] * rank)
    pads = _auto_pads(x, kernel, stride, facts.get("auto_pad", b"NOTSET")) or facts.get("pads")
    if largest:
        x, padding = _padded(x, pads, float("-inf"))
        largest_of: Op = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
        pooled: Tensor = largest_of(x, kernel, stride, padding, ceil_mode=bool(facts.get("ceil_mode", 0)))
        return pooled
    average: Op = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    include = bool(facts.get("count_include_pad", 0))
    if pads and not include and any(pads):
        ones, _ = _padded(torch.ones_like(x), pads)
        padded, padding = _padded(x, pads)
        if padding != [0] * rank:
            flat = [amount for amount in reversed(padding) for _ in (0, 1)]
            ones, padded = F.pad(ones, flat), F.pad(padded, flat)
        return torch.div(average(padded, kernel, stride), average(ones, kernel, stride))
    x, padding = _padded(x, pads)
    return torch.as_tensor(average(x, kernel, stride, padding, bool(facts.get("ceil_mode", 0)), True))


def reduce(x: Tensor, axes: Tensor | None = None, *, how: str, **facts: Any) -> Tensor:
    chosen = _ints(axes) if axes is not None else facts.get("axes")
    if chosen is None:
        chosen = [] if facts.get("noop_with_empty_axes") else list(range(x.ndim))
    if not chosen:
        return x
    keep = bool(facts.get("keepdims", 1))
    if how == "mean":
        return x.mean(dim=chosen, keepdim=keep)
    if how == "sum":
        return x.sum(dim=chosen, keepdim=keep)
    return x.amax(dim=chosen, keepdim=keep)


def reshape(x: Tensor, shape: Any, **facts: Any) -> Tensor:
    wanted = _ints(shape)
    if not facts.get("allowzero", 0):
        wanted = [x.shape[place] if dim == 0 else dim for place, dim in enumerate(wanted)]
    return x.reshape(wanted)


def clip(x: Tensor, low: Any = None, high: Any = None, **facts: Any) -> Tensor:
    bounds = [facts.get(name) if given is None else float(given) for name, given in (("min", low), ("max", high))]
    return torch.clamp(x, *bounds)


def pad(x: Tensor, pads: Any = None, value: Any = None, axes: Any = None, **facts: Any) -> Tensor:
    amounts = _ints(pads) if pads is not None else list(facts["pads"])
    half = len(amounts) // 2
    places = _ints(axes) if axes is not None else list(range(half))
    pairs = {place % x.ndim: (amounts[i], amounts[half + i]) for i, place in enumerate(places)}
    flat = [amount for place in reversed(range(x.ndim)) for amount in pairs.get(place, (0, 0))]
    mode = facts.get("mode", b"constant").decode()
    if mode == "constant":
        return F.pad(x, flat, value=float(value) if value is not None else facts.get("value", 0.0))
    while flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return F.pad(x, flat, mode={"edge": "replicate", "reflect": "reflect"}[mode])


def take_slice(x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    begin, end = _ints(starts), _ints(ends)
    places = _ints(axes) if axes is not None else list(range(len(begin)))
    strides = _ints(steps) if steps is not None else [1] * len(begin)
    for place, first, last, step in zip(places, begin, end, strides, strict=True):
        if step < 1:
            raise ArtifactError("Slice with a negative step", remedy="move the cut behind it")
        chosen = [slice(None)] * x.ndim
        chosen[place] = slice(first, None if last >= 2**31 - 1 else last, step)
        x = x[tuple(chosen)]
    return x


def gather(x: Any, index: Any, **facts: Any) -> Any:
    axis = facts.get("axis", 0)
    if isinstance(index, int):
        return x.select(axis, index)
    index = torch.as_tensor(index)
    return torch.index_select(x, axis, index.reshape(-1)).reshape(
        *x.shape[:axis], *index.shape, *x.shape[axis + 1 :] if axis >= 0 else x.shape[x.ndim + axis + 1 :]
    )


def split(x: Tensor, sizes: Any = None, **facts: Any) -> tuple[Tensor, ...]:
    axis = facts.get("axis", 0)
    if sizes is not None:
        return torch.split(x, _ints(sizes), axis)
    return torch.chunk(x, facts["num_outputs"], axis)


def squeeze(x: Tensor, axes: Any = None, **facts: Any) -> Tensor:
    chosen = _ints(axes) if axes is not None else facts.get("axes")
    return x.squeeze(tuple(chosen)) if chosen is not None else x.squeeze()


def unsqueeze(x: Tensor, axes: Any = None, **facts: Any) -> Tensor:
    chosen = _ints(axes) if axes is not None else facts["axes"]
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def flatten(x: Tensor, **facts: Any) -> Tensor:
    axis = facts.get("axis", 1) % (x.ndim + 1)
    return x.flatten(axis) if axis == 1 else x.reshape(int(torch.tensor(x.shape[:axis]).prod()), -1)


def local_response(x: Tensor, **facts: Any) -> Tensor:
    alpha, beta, bias = (facts.get(name, default) for name, default in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    return F.local_response_norm(x, facts["size"], alpha, beta, bias)


OPS: dict[str, Op] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "AveragePool": lambda x, **facts: pool(x, largest=False, **facts),
    "BatchNormalization": batch_norm,
    "Cast": lambda x, *, to, **_: x.to(DTYPES[to]),
    "Clip": clip,
    "Concat": lambda *parts, axis: torch.cat([torch.as_tensor(part) for part in parts], axis),
    "Conv": conv,
    "Div": torch.div,
    "Elu": lambda x, alpha=1.0: F.elu(x, alpha),
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": lambda x, shape: x * torch.ones(_ints(shape), dtype=x.dtype),
    "Flatten": flatten,
    "Gather": gather,
    "Gelu": lambda x, approximate=b"none": F.gelu(x, approximate=approximate.decode()),
    "Gemm": gemm,
    "GlobalAveragePool": lambda x: x.mean(dim=list(range(2, x.ndim)), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax(dim=list(range(2, x.ndim)), keepdim=True),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1),
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "LayerNormalization": layer_norm,
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "Log": torch.log,
    "LogSoftmax": lambda x, axis=-1: F.log_softmax(x, axis),
    "LRN": local_response,
    "MatMul": torch.matmul,
    "Max": lambda *parts: parts[0] if len(parts) == 1 else torch.maximum(*parts),
    "MaxPool": lambda x, **facts: pool(x, largest=True, **facts),
    "Min": lambda *parts: parts[0] if len(parts) == 1 else torch.minimum(*parts),
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Pad": pad,
    "Pow": torch.pow,
    "Reciprocal": torch.reciprocal,
    "ReduceMax": lambda x, axes=None, **facts: reduce(x, axes, how="max", **facts),
    "ReduceMean": lambda x, axes=None, **facts: reduce(x, axes, how="mean", **facts),
    "ReduceSum": lambda x, axes=None, **facts: reduce(x, axes, how="sum", **facts),
    "Relu": torch.relu,
    "Reshape": reshape,
    "Shape": lambda x, start=0, end=None: torch.tensor(x.shape[start:end]),
    "Sigmoid": torch.sigmoid,
    "Slice": take_slice,
    "Softmax": lambda x, axis=-1: torch.softmax(x, axis),
    "Softplus": F.softplus,
    "Split": split,
    "Sqrt": torch.sqrt,
    "Squeeze": squeeze,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Transpose": lambda x, perm=None: x.permute(perm or tuple(reversed(range(x.ndim)))),
    "Unsqueeze": unsqueeze,
    "Where": torch.where,
}
