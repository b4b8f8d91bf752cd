"""What a method is: a small state and a pure step. No engine, no file, no clock; labels only where they come late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.errors import ConfigError

if TYPE_CHECKING:
    from edge_adapt.tail import Tail

Array = NDArray[Any]
S = TypeVar("S")

TAPS, CUT, FEATURES = "taps", "cut", "features"
"""What a method may need of a look."""
LOGITS = "logits"
"""What a method may want to see of every answer, with or without `features`."""
SITES, HEAD, GRADIENTS, PROMPTS, IMAGES = "sites", "head", "gradients", "prompts", "images"
"""What a method may require of a bundle: norm sites; a linear head; something in the tail to learn; prompt inputs;
frames that are images of one or three channels."""
CHANGE = "domain change"
"""What a method says that begins its statistics anew, since the domain is another one."""


@dataclass(frozen=True)
class Observation:
    """What one look at some frames gave."""

    frames: Array
    """[N, ...] float32, as the network is fed."""
    logits: Array | None
    """[N, K], what the engine answered with the delta in force; None where the method answers."""
    cut: Array | None = None
    """[N, ...], the tensor at the cut; the frames themselves when the cut is the input."""
    taps: tuple[Array, Array] | None = None
    """Mean and second moment of every site's normalised input, each [N, channels]; source is 0 and 1."""
    trunk: Callable[[Array], Array] | None = None
    """Frames -> tensor at the cut: one more pass through the engine, for augmented views."""
    features: Array | None = None
    """[N, D], what the head was given."""
    cls: Array | None = None
    """[N, channels of the layer norms], the class token behind each; with the taps of a transformer."""
    rehearse: Callable[[Array, Delta], Observation] | None = None
    """Frames, a delta -> what they would give with it: one more pass, and what is in force stays."""
    delta: Delta | None = None
    """What all this was given with. It need not be the method's own: a guard may hold that back."""
    version: int = 0
    """Number of that change of weights, counted by the predictor; 0 is the model as exported."""

    def is_of(self, delta: Delta) -> bool:
        """True if that delta was in force."""
        return self.delta is not None and (self.delta is delta or self.delta.same_as(delta))


@dataclass(frozen=True)
class Answered:
    """What is about to leave the loop for some frames, looked at or not."""

    logits: Array
    """[N, K]."""
    features: Array | None = None
    """[N, D]; None from a method that answers by itself and does not give them."""
    version: int = 0
    """Number of the change of weights it was given with."""
    stands: Array | None = None
    """[N] bool, answers that are not given again, whatever was learned since; None if there is none."""

    @classmethod
    def of(cls, seen: Observation) -> Answered:
        """The engine's answer to frames that were looked at."""
        assert seen.logits is not None
        return cls(seen.logits, seen.features, seen.version)


@dataclass(frozen=True)
class Labelled:
    """Frames whose labels came, however late: the only labels that a method is ever shown."""

    cut: Array
    """[N, ...], the tensor at the cut, as it was when the frames were answered."""
    labels: Array
    """[N] integers, indices of classes."""
    task: int = 0
    """Counts up where whoever labels says that something new begins, such as classes never seen before."""


@dataclass(frozen=True)
class Step(Generic[S]):
    """What a step leaves behind."""

    state: S
    logits: Array | None = None
    """[N, K], the answer, from a method that answers itself; None: the engine's answer stands."""
    events: tuple[str, ...] = ()
    """What is worth telling: a change of domain, a refused step."""
    features: Array | None = None
    """[N, D], what the head was given for `logits`, from a method that answers itself."""
    again: bool = False
    """True if these frames are worth answering again with what was learned, where the answers have not left yet."""
    aside: Array | None = None
    """[N] bool, frames that a guard found too strange to learn from; None if there is none."""
    stands: Array | None = None
    """[N] bool, answers in `logits` that are not given again, whatever is learned; None if there is none."""


@dataclass(frozen=True)
class Context:
    """What a method is built on."""

    bundle: Bundle
    tail: Callable[[], Tail]
    """Loads the tail when first called; methods without gradients never do."""
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """Values for fields of the method's config."""

    @property
    def reference(self) -> bool:
        """True in reference mode: cut at the input, the method runs the whole network in torch, as published."""
        return self.bundle.is_reference


class Method(Protocol[S]):
    """State is a value: keep one and you have a snapshot, pass an old one and you have a rollback.

    `step` must not modify the state it is given. A method that is new is found by the entry point group
    `edge_adapt.methods` and tested by the contract suite.
    """

    name: ClassVar[str]
    requires: frozenset[str]
    """Of `sites`, `head`, `gradients`, `prompts` and `images`, what the bundle must have."""
    needs: frozenset[str]
    """Of `taps`, `cut` and `features`, what a look must bring."""
    watches: frozenset[str]
    """Empty, or `logits` with or without `features`: what `watch` is shown of every answer."""
    answers: bool
    """True if `step` returns the answer itself; False if the engine answers with `delta(state)`."""

    def __init__(self, context: Context) -> None: ...

    def init(self) -> S: ...

    def look(self, state: S, frames: int, passed: int) -> int:
        """How many of the next `frames` frames to look at before the next step; 0 answers all of them unseen.

        `passed` frames were answered unseen since the last look.
        """
        ...

    def step(self, state: S, seen: Observation) -> Step[S]: ...

    def watch(self, state: S, answered: Answered) -> Step[S]:
        """Called with every answer before it leaves, if `watches` is not empty; its logits, if any, are the answer.

        After `step`, where the frames were looked at. On the answer path: no gradients, no pass through the network.
        """
        ...

    def delta(self, state: S) -> Delta:
        """What the next answers shall be given with. The same object as long as nothing changed."""
        ...


@runtime_checkable
class LearnsFromLabels(Protocol[S]):
    """What a method has besides, if it can use labels that come late. `isinstance` tells.

    Whoever gets the labels hands them over, between two steps; to the loop nothing changes.
    """

    def learn_from(self, state: S, labelled: Labelled) -> Step[S]:
        """One step on frames answered long ago. Like `step`, it leaves the state it is given alone.

        Raises: DataError if a label is no output of the model.
        """
        ...

    def predict(self, state: S, cut: Array) -> Array:
        """Logits [N, K] for the tensor at the cut; may cost several passes through the tail, and changes nothing."""
        ...


@runtime_checkable
class Compacts(Protocol[S]):
    """What a method has besides, if not all of its state is worth keeping while another works. `isinstance` tells."""

    def compact(self, state: S) -> S:
        """A smaller state to go on from one day, such as averages in single precision, and no frames in hand.

        Its delta is the very object. Like `step`, it leaves the state it is given alone.
        """
        ...


def compacted(method: Method[S], state: S) -> S:
    """The state of a method as it is kept while another one is at work; the same where the method does not say."""
    return method.compact(state) if isinstance(method, Compacts) else state


@runtime_checkable
class Routes(Protocol):
    """What a router has besides: it can say which domain it took the latest frames for. `isinstance` tells."""

    def route(self, state: Any) -> str:
        """Name of the domain whose state answers."""
        ...


def configured(config: Any, settings: dict[str, Any]) -> Any:
    """A frozen config dataclass with some fields replaced. Raises: ConfigError for an unknown field."""
    from dataclasses import fields, replace

    from edge_adapt.errors import did_you_mean

    known = {item.name for item in fields(config)}
    for name in settings:
        if name not in known:
            raise ConfigError(f"{type(config).__name__} has no setting {name!r}", remedy=did_you_mean(name, known))
    return replace(config, **settings)
