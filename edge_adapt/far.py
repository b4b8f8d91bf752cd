"""The tail on a GPU, beside the engine: tensors come from the CPU and go back to it, so that methods need not know.

What a method keeps (parameters, Adam, random numbers) stays on the CPU; forward and backward through the tail, which
is where the time goes, run on the device, on a stream of low priority. **Not run by us on a GPU.**
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from edge_adapt.bundle import Bundle
from edge_adapt.delta import PORT_SCALE, Delta
from edge_adapt.errors import EngineError
from edge_adapt.tail import Hook, Norm, Ports, Tail, batch_statistics, port_tensors

Where = Literal["cpu", "cuda", "auto"]
LOW_PRIORITY = 0
"""Answers run at -1, which goes first."""


class FarTail(Tail):
    """Evaluates on a device what needs nothing of the caller's but tensors; hooks and other norms run on the CPU."""

    def __init__(self, bundle: Bundle, *, device: str = "cuda", memory_mb: float | None = None) -> None:
        """memory_mb: what PyTorch may take of the device's memory; None: all of it."""
        super().__init__(bundle)
        self._near = Tail(bundle)
        self._far = Tail(bundle, device=device)
        self._stream = None
        if self._far.device.type == "cuda":
            self._stream = torch.cuda.Stream(self._far.device, priority=LOW_PRIORITY)  # type: ignore[no-untyped-call]
            if memory_mb is not None:
                whole = torch.cuda.get_device_properties(self._far.device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, memory_mb * 1e6 / whole), self._far.device)

    @property
    def near(self) -> Tail:
        return self._near

    def with_features(
        self,
        h: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        ports: Delta | Ports | None = None,
        norm: Norm | None = None,
        hooks: Mapping[str, Hook] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As of a tail. Raises: torch.OutOfMemoryError; what PyTorch had kept for later is given back before."""
        if hooks or norm not in (None, batch_statistics):
            return super().with_features(h, parameters, ports=ports, norm=norm, hooks=hooks)
        device = self._far.device
        with self._working():
            values = {name: value.to(device) for name, value in (parameters or {}).items()}
            logits, features = self._far.with_features(h.to(device), values, ports=_sent(ports, device), norm=norm)
            return logits.to(h.device), features.to(h.device)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        try:
            with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                yield
        except torch.OutOfMemoryError:
            if self._stream is not None:
                torch.cuda.empty_cache()  # on a Jetson this is the memory that the engine answers with
            raise


def tail_on(bundle: Bundle, device: Where = "cpu", memory_mb: float | None = None) -> Tail:
    """The tail where it is wanted; `auto` takes a GPU if there is one. Raises: EngineError if it is not there."""
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise EngineError(
            f"learning on cuda was asked for, and torch {torch.__version__} finds no GPU",
            remedy="use `device: cpu`, or install the torch that NVIDIA builds for this board",
        )
    return FarTail(bundle, memory_mb=memory_mb) if found and device != "cpu" else Tail(bundle)


def _sent(ports: Delta | Ports | None, device: torch.device) -> Ports | None:
    if ports is None or (isinstance(ports, Delta) and PORT_SCALE not in ports):
        return None
    if isinstance(ports, Delta):
        return port_tensors(ports, device)
    return ports[0].to(device), ports[1].to(device)
