"""The tail: from the cut to the logits, in torch, with frozen weights. Evaluated with a delta on top, for learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_adapt.bundle import TAIL, Bundle
from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, Delta
from edge_adapt.errors import ArtifactError

Array = NDArray[Any]


class Tail:
    """One frozen program; student, teacher and anchor are sets of parameters passed to it.

    `parameters` maps the name of every weight and bias to its source value; do not modify them in place.
    """

    def __init__(self, bundle: Bundle) -> None:
        path = bundle.path / TAIL
        self._program = load_program(path).module()
        self._batch_program = batch_statistics(load_program(path).module())
        self.parameters: dict[str, Tensor] = {
            name: value.detach() for name, value in self._program.named_parameters()
        }
        self.buffers: dict[str, Tensor] = dict(self._program.named_buffers())
        self.bundle = bundle
        sites = [site for site in bundle.manifest.sites if site.in_tail]
        self.norms = tuple(site.name for site in sites)
        self._statistics = {
            site.name: (
                torch.from_numpy(bundle.source[f"{site.name}.mean"].copy()),
                torch.from_numpy(bundle.source[f"{site.name}.std"].copy()),
            )
            for site in sites
            if site.kind == "batch_norm"
        }
        self._epsilon = {
            name: (std.square() - self.buffers[f"{name}.running_var"]) for name, (_, std) in self._statistics.items()
        }

    @property
    def norm_parameters(self) -> dict[str, Tensor]:
        """Weights and biases of the norms in the tail."""
        names = [f"{site}.{role}" for site in self.norms for role in ("weight", "bias")]
        return {name: self.parameters[name] for name in names}

    def __call__(
        self, h: Tensor, parameters: dict[str, Tensor] | None = None, *, ports: Delta | None = None, batch: bool = False
    ) -> Tensor:
        """Logits [N, K] for h [N, ...].

        Args:
            parameters: values that replace source weights, by name; gradients reach them.
            ports: port values of the sites in the tail, from a delta; None for identity.
            batch: normalise by the statistics of this batch, as TENT and CoTTA do in the literature.
        """
        replaced: dict[str, Tensor] = dict(parameters or {})
        if batch:
            return self._call(self._batch_program, replaced, h)
        if ports:
            replaced |= self._ported(ports, replaced)
        return self._call(self._program, replaced, h)

    def with_delta(self, h: Tensor, delta: Delta) -> Tensor:
        """Logits with a whole delta on top: its tail parameters and its ports."""
        values = {name: torch.from_numpy(value.copy()) for name, value in delta.tail.items()}
        return self(h, values, ports=delta)

    def _ported(self, ports: Delta, replaced: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ports of the tail's sites, as statistics of a batch norm, or folded into the affine of a layer norm."""
        if PORT_SCALE not in ports:
            return {}
        made: dict[str, Tensor] = {}
        for site in self.norms:
            place = self.bundle.slices[site]
            scale = torch.from_numpy(ports[PORT_SCALE][place].copy())
            shift = torch.from_numpy(ports[PORT_SHIFT][place].copy())
            if site in self._statistics:
                mean, std = self._statistics[site]
                made[f"{site}.running_mean"] = mean - shift * std / scale
                made[f"{site}.running_var"] = (std / scale).square() - self._epsilon[site]
            else:
                weight = replaced.get(f"{site}.weight", self.parameters[f"{site}.weight"])
                bias = replaced.get(f"{site}.bias", self.parameters[f"{site}.bias"])
                made |= {f"{site}.weight": weight * scale, f"{site}.bias": weight * shift + bias}
        return made

    @staticmethod
    def _call(program: nn.Module, replaced: dict[str, Tensor], h: Tensor) -> Tensor:
        made: Tensor = torch.func.functional_call(program, replaced, (h,))
        return made


def load_program(path: Path) -> torch.export.ExportedProgram:
    """A saved torch.export program. Raises: ArtifactError if it cannot be read by this torch."""
    try:
        return torch.export.load(path)
    except Exception as error:  # zip, JSON and schema errors of many types
        raise ArtifactError(
            f"{path} cannot be read by torch {torch.__version__}: {type(error).__name__}: {error}",
            remedy="export the bundle again with a torch that is not newer than the device's",
        ) from error


def batch_statistics(program: nn.Module) -> nn.Module:
    """The same program with every batch norm normalising by its own batch; stored statistics are not touched."""
    graph = program.graph
    assert isinstance(graph, torch.fx.Graph)
    for node in graph.nodes:
        if node.target == torch.ops.aten.batch_norm.default:
            x, weight, bias, _, _, _, momentum, epsilon, cudnn = node.args
            node.args = (x, weight, bias, None, None, True, momentum, epsilon, cudnn)
    program.recompile()  # type: ignore[operator]
    return program
