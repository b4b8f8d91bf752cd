"""The tail: from the cut to the logits, in torch, with frozen weights. Evaluated with a delta on top, for learning."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from edge_adapt.bundle import TAIL, Bundle
from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, Delta
from edge_adapt.errors import ArtifactError

Array = NDArray[Any]
aten = torch.ops.aten


@dataclass(frozen=True)
class NormCall:
    """What a batch norm in the tail is about to do."""

    site: str
    x: Tensor
    """[N, C, ...]."""
    weight: Tensor
    bias: Tensor
    mean: Tensor
    """[C], stored, or as the ports say."""
    variance: Tensor
    epsilon: float


Norm = Callable[[NormCall], Tensor]
"""How a batch norm normalises, in place of its stored statistics."""

Ports = tuple[Tensor, Tensor]
"""Scale and shift of all sites, each [channels]."""

Hook = Callable[[Tensor, Tensor], Tensor]
"""Input and output of a layer -> what the rest of the network is given instead of the output."""


@dataclass(frozen=True)
class TailLayer:
    """A convolution or matrix product with a weight of its own."""

    name: str
    """Its parameters are `<name>.weight`, and `<name>.bias` where it has one."""
    kind: Literal["conv", "linear", "matmul"]
    """Layout of the weight: conv [out, in / groups, ...], linear [out, in], matmul [in, out]."""
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()


class Tail:
    """One frozen program; student, teacher and anchor are sets of parameters passed to it.

    `parameters` maps the name of every weight and bias to its source value; do not modify them in place.
    """

    def __init__(self, bundle: Bundle, *, device: str = "cpu") -> None:
        """device: where its tensors are, those that it is given included. `far.FarTail` sends them there and back."""
        self.bundle, self.device = bundle, torch.device(device)
        self._program = self._load()
        self.parameters: dict[str, Tensor] = {
            name: value.detach() for name, value in self._program.named_parameters()
        }
        self.buffers: dict[str, Tensor] = dict(self._program.named_buffers())
        sites = [site for site in bundle.manifest.sites if site.in_tail]
        self.norms = tuple(site.name for site in sites)
        self._statistics = {
            site.name: (
                torch.tensor(bundle.source[f"{site.name}.mean"], device=self.device),
                torch.tensor(bundle.source[f"{site.name}.std"], device=self.device),
            )
            for site in sites
            if site.kind == "batch_norm"
        }
        self._epsilon = {
            name: (std.square() - self.buffers[f"{name}.running_var"]) for name, (_, std) in self._statistics.items()
        }

    @property
    def near(self) -> Tail:
        """The tail on the CPU."""
        return self

    @cached_property
    def layers(self) -> dict[str, TailLayer]:
        """Every layer that an adapter may be put on, in the order of the network."""
        found = (_layer(node) for node in _graph(self._program).nodes)
        return {layer.name: layer for layer in found if layer}

    @property
    def norm_parameters(self) -> dict[str, Tensor]:
        """Weights and biases of the norms in the tail."""
        names = [f"{site}.{role}" for site in self.norms for role in ("weight", "bias")]
        return {name: self.parameters[name] for name in names}

    def __call__(
        self,
        h: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        ports: Delta | Ports | None = None,
        norm: Norm | None = None,
        hooks: Mapping[str, Hook] | None = None,
    ) -> Tensor:
        """Logits [N, K] for h [N, ...]; arguments as in `with_features`."""
        return self.with_features(h, parameters, ports=ports, norm=norm, hooks=hooks)[0]

    def with_features(
        self,
        h: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        ports: Delta | Ports | None = None,
        norm: Norm | None = None,
        hooks: Mapping[str, Hook] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [N, K] and the head's input [N, D]; [N, 0] where no linear head makes the logits.

        Args:
            parameters: values that replace source weights, by name; gradients reach them.
            ports: port values of all sites, from a delta or as scale and shift [channels]; None for identity.
            norm: how batch norms normalise, such as by the statistics of this batch; None for stored statistics.
            hooks: layer -> what to do with its output, for adapters that are no change of its weight.
        """
        replaced: dict[str, Tensor] = dict(parameters or {})
        if ports is not None:
            replaced |= self._ported(ports, replaced)
        program = self._program
        if norm is not None or hooks:
            program, self._norm, self._hooks = self._open, norm or _stored, hooks or {}
        logits, features = torch.func.functional_call(program, replaced, (h,))
        if self.bundle.manifest.output == "probabilities":
            logits = logits.clamp_min(1e-12).log()
        return logits, features

    def with_delta(self, h: Tensor, delta: Delta) -> Tensor:
        """Logits with a whole delta on top: its tail parameters and its ports."""
        values = {name: torch.from_numpy(value.copy()) for name, value in delta.tail.items()}
        return self(h, values, ports=delta)

    def _ported(self, ports: Delta | Ports, replaced: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ports of the tail's sites, as statistics of a batch norm, or folded into the affine of a layer norm."""
        if isinstance(ports, Delta):
            if PORT_SCALE not in ports:
                return {}
            ports = port_tensors(ports, self.device)
        made: dict[str, Tensor] = {}
        for site in self.norms:
            place = self.bundle.slices[site]
            scale, shift = ports[0][place], ports[1][place]
            if site in self._statistics:
                mean, std = self._statistics[site]
                made[f"{site}.running_mean"] = mean - shift * std / scale
                made[f"{site}.running_var"] = (std / scale).square() - self._epsilon[site]
            else:
                weight = replaced.get(f"{site}.weight", self.parameters[f"{site}.weight"])
                bias = replaced.get(f"{site}.bias", self.parameters[f"{site}.bias"])
                made |= {f"{site}.weight": weight * scale, f"{site}.bias": weight * shift + bias}
        return made

    def _load(self) -> nn.Module:
        exported = load_program(self.bundle.path / TAIL)
        if self.device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            exported = move_to_device_pass(exported, self.device)
        program = exported.module()
        _return_features(program)
        return program

    @cached_property
    def _open(self) -> nn.Module:
        """The same program, whose norms and layers ask `_norm` and `_hooks` what to do."""
        program = self._load()
        graph = _graph(program)
        for node in list(graph.nodes):
            if node.target == aten.batch_norm.default:
                x, weight, bias, mean, variance, _, _, epsilon, _ = node.args
                site = str(weight.target).rpartition(".")[0]
                node.target, node.args = self._normalise, (site, x, weight, bias, mean, variance, epsilon)
                continue
            layer = _layer(node)
            if layer is None:
                continue
            end = _with_bias(node)
            with graph.inserting_after(end):
                hooked = graph.call_function(self._hook, (layer.name, node.args[0], end))
            end.replace_all_uses_with(hooked, delete_user_cb=partial(operator.is_not, hooked))
        program.recompile()  # type: ignore[operator]
        return program

    def _normalise(
        self, site: str, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float
    ) -> Tensor:
        return self._norm(NormCall(site, x, weight, bias, mean, variance, epsilon))

    def _hook(self, layer: str, x: Tensor, y: Tensor) -> Tensor:
        hook = self._hooks.get(layer)
        return y if hook is None else hook(x, y)


def port_tensors(ports: Delta, device: torch.device) -> Ports:
    """Scale and shift of a delta that has them."""
    return torch.tensor(ports[PORT_SCALE], device=device), torch.tensor(ports[PORT_SHIFT], device=device)


def batch_statistics(call: NormCall) -> Tensor:
    """By the statistics of this very batch, as TENT and CoTTA do in the literature."""
    return torch.batch_norm(call.x, call.weight, call.bias, None, None, True, 0.1, call.epsilon, False)


def _stored(call: NormCall) -> Tensor:
    return torch.batch_norm(
        call.x, call.weight, call.bias, call.mean, call.variance, False, 0.1, call.epsilon, False
    )


def load_program(path: Path) -> torch.export.ExportedProgram:
    """A saved torch.export program. Raises: ArtifactError if it cannot be read by this torch."""
    try:
        return torch.export.load(path)
    except Exception as error:  # zip, JSON and schema errors of many types
        raise ArtifactError(
            f"{path} cannot be read by torch {torch.__version__}: {type(error).__name__}: {error}",
            remedy="export the bundle again with a torch that is not newer than the device's",
        ) from error


def _graph(program: nn.Module) -> fx.Graph:
    graph = program.graph
    assert isinstance(graph, fx.Graph)
    return graph


def _return_features(program: nn.Module) -> None:
    """Make the input of the last linear layer a second output."""
    graph = _graph(program)
    end = next(node for node in graph.nodes if node.op == "output")
    logits = end.args[0][0]
    head = logits
    while head.target in (aten.softmax.int, aten.log_softmax.int):
        head = head.args[0]
    with graph.inserting_before(end):
        features = (
            head.args[0]
            if head.target == aten.linear.default
            else graph.call_function(aten.slice.Tensor, (logits, -1, 0, 0))
        )
    end.args = ((logits, features),)
    program._out_spec = None  # type: ignore[assignment]
    graph._codegen = fx.graph.CodeGen()
    program.recompile()  # type: ignore[operator]


def _layer(node: fx.Node) -> TailLayer | None:
    """What an adapter needs to know of a node; None if it is no layer with a weight of its own."""
    kinds: dict[Any, Literal["conv", "linear", "matmul"]] = {
        aten.conv1d.default: "conv",
        aten.conv2d.default: "conv",
        aten.conv3d.default: "conv",
        aten.linear.default: "linear",
        aten.matmul.default: "matmul",
    }
    kind = kinds.get(node.target)
    weight = node.args[1] if kind else None
    if kind is None or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    name = str(weight.target).rpartition(".")[0]
    if kind != "conv":
        return TailLayer(name, kind)
    facts: list[Any] = [*node.args[3:], *([1], [0], [1], 1)[max(0, len(node.args) - 3) :]]
    return TailLayer(name, kind, int(facts[3]), tuple(facts[0]), tuple(facts[1]))


def _with_bias(node: fx.Node) -> fx.Node:
    """The addition of a bias that follows a bare matrix product, or the node itself."""
    if node.target != aten.matmul.default or len(node.users) != 1:
        return node
    (user,) = node.users
    biased = user.target == aten.add.Tensor and any(
        isinstance(other, fx.Node) and other.op == "get_attr" for other in user.args
    )
    return user if biased else node
