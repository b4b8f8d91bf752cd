"""What the rest of the system asks of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.merge import LiveUpdate

Array = NDArray[Any]


@dataclass(frozen=True)
class Observed:
    """One pass through the tapped twin of the network."""

    logits: Array
    """[N, K], with the weights in force."""
    cut: Array | None
    """[N, ...], the tensor at the cut."""
    taps: Array | None
    """[N, 2, channels of all sites]: mean and second moment of every site's output, as the engine has it now."""
    cls: Array | None = None
    """[N, channels of the layer norms]: the class token behind each of them, where taps are asked of a transformer."""
    features: Array | None = None
    """[N, D], what the head is given."""
    tag: object = None
    """What `apply` was given with the weights that answered; None for those of the bundle, and for a rehearsal."""


class Engine(Protocol):
    """Runs the whole network; its weights are live.

    `run`, `observe` and `apply` may be called from different threads: a run sees the weights of before or of after an
    `apply`, never a mixture.
    """

    name: ClassVar[str]

    def __init__(self, bundle: Bundle, *, threads: int = 1) -> None: ...

    @classmethod
    def probe(cls) -> str | None:
        """None, or the reason why this engine cannot run here."""
        ...

    def run(self, frames: Array) -> Array:
        """Answer. frames: [N, ...] float32 as the manifest's input -> logits [N, K]."""
        ...

    def observe(self, frames: Array, *, cut: bool = False, taps: bool = False, features: bool = False) -> Observed:
        """Answer, and let the outside look inside. Taps cost more than `run`; the cut and the features hardly do."""
        ...

    def rehearse(
        self, update: LiveUpdate, frames: Array, *, cut: bool = False, taps: bool = False, features: bool = False
    ) -> Observed:
        """`observe` with other weights that are not put in force: what would the answer be?"""
        ...

    def apply(self, update: LiveUpdate, tag: object = None) -> None:
        """Write new weights. Rebuilds nothing where the engine can edit in place.

        `tag` comes back with every answer of these weights: a caller in another thread can tell which they were.
        """
        ...

    @property
    def description(self) -> str:
        """One line: provider, threads, and how its weights are changed."""
        ...

    def close(self) -> None: ...
