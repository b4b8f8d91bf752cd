"""NORM: normalise by the statistics of the target, no gradients: batch, mixed with source, averaged, or of one frame.

Batch statistics: AdaBN (Li et al., Pattern Recognition 2018). Mixed with source: by a fixed share, or by count
(Schneider et al., "Improving Robustness Against Common Corruptions by Covariate Shift Adaptation", NeurIPS 2020).
IABN (Gong et al., NOTE, NeurIPS 2022): each frame by its own, as far as they are not noise. MECTA (Hong et al.,
ICLR 2023): an average that moves as far as the batch differs from it.

On the device the ports lag: an answer uses statistics of frames before it. Unlike `moments` this looks at every frame
and moves every channel: there is no dead zone, and no source as calibration measured it. `Moments` tells of a change of
domain, and the average begins anew there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softshrink

from edge_adapt.delta import Delta
from edge_adapt.errors import ConfigError
from edge_adapt.methods.moments import Moments, MomentsConfig, MomentsState
from edge_adapt.methods.protocol import CHANGE, CUT, SITES, TAPS, Answered, Context, Observation, Step, configured
from edge_adapt.tail import NormCall

Array = NDArray[Any]
Kind = Literal["batch", "mix", "count", "ema", "iabn", "mecta"]
Pair = tuple[Tensor, Tensor]
"""Mean and variance, each [C]."""
Number = TypeVar("Number", Tensor, Array)

DIVERGENCE_EPSILON = 1e-3
LEAST_VARIANCE = 1e-4
UNSETTLED = 32
"""Device: frames that the average goes over at least, while ports move much."""


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Defaults are those of the papers; on the device those of the trials that `moments` came from."""

    kind: Kind | None = None
    """`batch`: those of the batch. `mix`: (1 - alpha) source + alpha batch. `count`: alpha = n / (n + source_count).
    `ema`: an average that starts at source. `iabn`: each frame by its own. `mecta`. None: `batch` in reference mode,
    `count` on the device, where the batch is the last `memory` frames."""
    alpha: float = 0.1
    source_count: float = 16.0
    """N, how many frames the source counts as."""
    momentum: float | None = None
    """Share of the newest batch in the average; None: 0.1 for `ema`, 0.01 for `iabn`. Reference mode only."""
    k: float = 4.0
    """IABN: standard errors that a frame has to differ by."""
    memory: int = 128
    """Device: frames that the average goes over."""
    group: int = 8
    """Device: at most so many frames are looked at before the ports are set again."""

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in get_args(Kind):
            raise ConfigError(f"norm.kind is {self.kind!r}", remedy=f"known: {', '.join(get_args(Kind))}")
        for name in ("alpha", "momentum"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"norm.{name} is {value}, expected 0 to 1", remedy="use the default")
        for name, least in (("source_count", 0), ("k", 0), ("memory", 1), ("group", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"norm.{name} is {getattr(self, name)}, expected {least} or more", remedy="use the default"
                )


@dataclass(frozen=True)
class NormState:
    """The running statistics of all sites; a method that keeps none leaves them at source."""

    mean: Array
    """[channels of all sites]; in reference mode as the network stores it, on the device in units of that: 0."""
    variance: Array
    """Likewise; on the device source is 1."""
    count: int
    """Device: frames in the average, at most `memory`."""
    delta: Delta
    watch: MomentsState | None = None
    """Device: what notices a change of domain."""


class Norm:
    """Statistics of the target in every batch norm; the learned affine stays."""

    name: ClassVar[str] = "norm"
    requires: frozenset[str] = frozenset({SITES})
    watches: frozenset[str] = frozenset()
    answers: bool
    needs: frozenset[str]

    def __init__(self, context: Context, config: NormConfig | None = None) -> None:
        self.config: NormConfig = configured(config or NormConfig(), context.settings)
        bundle = context.bundle
        sites = bundle.manifest.sites
        if not any(site.kind == "batch_norm" for site in sites):
            raise ConfigError(
                f"bundle {bundle.manifest.name!r} has no batch norm: its norms keep no statistics to replace",
                remedy="use moments, tent or foa_shift",
            )
        self.reference = self.answers = context.reference
        self.needs = frozenset({CUT} if self.reference else {TAPS})
        self.kind: Kind = self.config.kind or ("batch" if self.reference else "count")
        if self.kind == "iabn" and not self.reference:
            raise ConfigError(
                "norm.kind is 'iabn', which corrects each frame by itself: ports are set before a frame is seen",
                remedy="use kind: mecta, or moments, or a bundle that was cut at its input",
            )
        self.slices = bundle.slices
        self.sizes = np.array([site.channels for site in sites])
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self.keeps = np.repeat([site.kind == "batch_norm" for site in sites], self.sizes)
        if self.reference:
            self.tail = context.tail()
            self.source = self._stored()
        else:
            self.moments = Moments(replace(context, settings={}), MomentsConfig(group=self.config.group))
            self.source = np.zeros(bundle.channels), np.ones(bundle.channels)

    def _stored(self) -> tuple[Array, Array]:
        """Running statistics as the network has them, packed."""
        mean, variance = np.zeros(int(self.sizes.sum()), np.float32), np.ones(int(self.sizes.sum()), np.float32)
        for site, place in self.slices.items():
            if f"{site}.running_mean" in self.tail.buffers:
                mean[place] = self.tail.buffers[f"{site}.running_mean"].numpy()
                variance[place] = self.tail.buffers[f"{site}.running_var"].numpy()
        return mean, variance

    def init(self) -> NormState:
        watch = None if self.reference else self.moments.init()
        return NormState(*self.source, count=0, delta=Delta.source(), watch=watch)

    def look(self, state: NormState, frames: int, passed: int) -> int:
        return frames if self.reference else min(frames, self.config.group)

    def watch(self, state: NormState, answered: Answered) -> Step[NormState]:
        return Step(state)

    def delta(self, state: NormState) -> Delta:
        return state.delta

    def step(self, state: NormState, seen: Observation) -> Step[NormState]:
        return self._answer(state, seen) if self.reference else self._follow(state, seen)

    def _answer(self, state: NormState, seen: Observation) -> Step[NormState]:
        """Reference: the batch through the whole network. `ema` needs two passes: one to measure, one to answer."""
        mean, variance = state.mean.copy(), state.variance.copy()
        kinds: dict[Kind, Callable[[NormCall], Tensor]] = {
            "batch": _by_batch,
            "mix": partial(_mixed, alpha=self.config.alpha),
            "count": partial(_mixed, alpha=len(seen.frames) / (len(seen.frames) + self.config.source_count)),
            "ema": partial(self._measured, mean=mean, variance=variance),
            "iabn": partial(self._of_one_frame, mean=mean, variance=variance),
            "mecta": partial(self._by_divergence, mean=mean, variance=variance),
        }
        h = torch.tensor(seen.cut)
        with torch.no_grad():
            logits, features = self.tail.with_features(h, norm=kinds[self.kind])
            if self.kind == "ema":
                logits, features = self.tail.with_features(
                    h, norm=lambda call: _by(call, self._of(call.site, mean), self._of(call.site, variance))
                )
        events: tuple[str, ...] = ()
        if np.isfinite(mean).all() and np.isfinite(variance).all():
            state = replace(state, mean=mean, variance=variance)
        else:
            events = ("refused: statistics are not finite",)
        return Step(state, logits.numpy(), events, features.numpy())

    def _of(self, site: str, packed: Array) -> Tensor:
        """One site's part of a packed vector; writing to it changes the vector."""
        return torch.from_numpy(packed[self.slices[site]])

    def _measured(self, call: NormCall, mean: Array, variance: Array) -> Tensor:
        """`ema`, first pass: by the batch, while the average takes it in."""
        self._take_in(call, mean, variance, 0.1)
        return _by_batch(call)

    def _of_one_frame(self, call: NormCall, mean: Array, variance: Array) -> Tensor:
        """IABN: the average so far, corrected for each frame; the average then takes the batch in."""
        made = iabn(call, self._of(call.site, mean), self._of(call.site, variance), self.config.k)
        self._take_in(call, mean, variance, 0.01)
        return made

    def _take_in(self, call: NormCall, mean: Array, variance: Array, momentum: float) -> None:
        found = moments_of(call.x, unbiased=True)
        if found is None:
            return
        share = momentum if self.config.momentum is None else self.config.momentum
        for packed, batch in zip((mean, variance), found, strict=True):
            self._of(call.site, packed).lerp_(batch, share)

    def _by_divergence(self, call: NormCall, mean: Array, variance: Array) -> Tensor:
        """MECTA: the average moves by beta towards the batch, and normalises."""
        running = self._of(call.site, mean), self._of(call.site, variance)
        found = moments_of(call.x, unbiased=False)
        if found is not None:
            beta = 1 - math.exp(-float(divergence(*running, *found).mean()))
            for part, batch in zip(running, found, strict=True):
                part.lerp_(batch, beta)
        return _by(call, *running)

    def _follow(self, state: NormState, seen: Observation) -> Step[NormState]:
        """Device: take the taps of these frames into the average, and set the ports for the next."""
        assert seen.taps is not None and state.watch is not None
        means, seconds = seen.taps
        if not (np.isfinite(means).all() and np.isfinite(seconds).all()):
            return Step(state, events=("refused: taps are not finite",))
        watched = self.moments.step(state.watch, seen)
        mean, second, frames = means.mean(axis=0), seconds.mean(axis=0), len(means)
        if CHANGE in watched.events:  # what it knows of the new domain is more than these frames
            state = self.init()
            mean, second, frames = watched.state.mean, watched.state.second, watched.state.count
        state, variance = replace(state, watch=watched.state), np.maximum(second - np.square(mean), 0)
        state = (self._moved if self.kind == "mecta" else self._averaged)(state, mean, variance, frames)
        return Step(replace(state, delta=self._ports(state)), events=watched.events, again=watched.again)

    def _averaged(self, state: NormState, mean: Array, variance: Array, frames: int) -> NormState:
        """Over half of the frames of this domain, so that those seen before ports moved are forgotten, and at most
        `memory`; `ema` starts with a memory full of source."""
        assert state.watch is not None
        memory = self.config.memory
        memory = memory if self.kind == "ema" else int(np.clip(state.watch.seen / 2, min(UNSETTLED, memory), memory))
        count = memory if self.kind == "ema" else min(state.count + frames, memory)
        rate = min(1.0, frames / count)
        moved = state.mean + rate * (mean - state.mean)
        old, new = state.variance + np.square(state.mean), variance + np.square(mean)
        return replace(state, mean=moved, variance=old + rate * (new - old) - np.square(moved), count=count)

    def _moved(self, state: NormState, mean: Array, variance: Array, frames: int) -> NormState:
        """MECTA: each site by its own beta."""
        distance = divergence(state.mean, state.variance, mean, variance)
        beta = np.repeat(1 - np.exp(-np.add.reduceat(distance, self.starts) / self.sizes), self.sizes)
        return replace(
            state,
            mean=state.mean + beta * (mean - state.mean),
            variance=state.variance + beta * (variance - state.variance),
            count=min(state.count + frames, self.config.memory),
        )

    def _ports(self, state: NormState) -> Delta:
        """Mix with source, which is 0 and 1 in these units, and say it as scale and shift."""
        shares = {"mix": self.config.alpha, "count": state.count / (state.count + self.config.source_count)}
        share = np.where(self.keeps, shares.get(self.kind, 1.0), 0.0)
        variance = 1 + share * (np.maximum(state.variance, LEAST_VARIANCE) - 1)
        scale = 1 / np.sqrt(np.maximum(variance, LEAST_VARIANCE))
        return Delta.of_ports(scale, -share * state.mean * scale)


def moments_of(x: Tensor, *, unbiased: bool) -> Pair | None:
    """Mean and variance of each channel of x [N, C, ...]; None where a channel has one value only."""
    if x.numel() <= x.shape[1]:
        return None
    over = [axis for axis in range(x.ndim) if axis != 1]
    return x.mean(over), x.var(over, correction=int(unbiased))


def divergence(mean: Number, variance: Number, other_mean: Number, other_variance: Number) -> Number:
    """Symmetric Kullback-Leibler divergence of Gaussians, in nats: 0 for the same. Any shape."""
    first, second = variance + DIVERGENCE_EPSILON, other_variance + DIVERGENCE_EPSILON
    apart = (mean - other_mean) ** 2
    made: Number = ((first + apart) / second + (second + apart) / first) / 2 - 1
    return made


def iabn(call: NormCall, mean: Tensor, variance: Tensor, k: float) -> Tensor:
    """Each frame by its own statistics, so far as they are more than k standard errors from the stored ones.

    m' = m + shrink(m_i - m, k sqrt(v / L)), v' = v + shrink(v_i - v, k v sqrt(2 / (L - 1))), L positions in a frame.
    A frame of one position has no variance: it is normalised by what is stored.
    """
    flat = call.x.flatten(2) if call.x.ndim > 2 else call.x[..., None]
    positions = flat.shape[2]
    if positions < 2:
        return _by(call, mean, variance)
    own_mean, own_variance = flat.mean(2), flat.var(2, correction=1)
    mean_error, variance_error = (variance / positions).sqrt(), variance * math.sqrt(2 / (positions - 1))
    # softshrink knows one threshold for all: shrink in standard errors.
    mean = mean + _shrunk(own_mean - mean, mean_error, k)
    variance = (variance + _shrunk(own_variance - variance, variance_error, k)).clamp_min(0)
    per_frame = (*mean.shape, *(1,) * (call.x.ndim - 2))
    affine = (1, *per_frame[1:])
    scaled = (call.x - mean.view(per_frame)) / (variance.view(per_frame) + call.epsilon).sqrt()
    return scaled * call.weight.view(affine) + call.bias.view(affine)


def _shrunk(difference: Tensor, error: Tensor, k: float) -> Tensor:
    error = error.clamp_min(1e-12)
    return softshrink(difference / error, k) * error


def _by(call: NormCall, mean: Tensor, variance: Tensor) -> Tensor:
    return torch.batch_norm(call.x, call.weight, call.bias, mean, variance, False, 0.0, call.epsilon, False)


def _by_batch(call: NormCall) -> Tensor:
    found = moments_of(call.x, unbiased=False)
    return _by(call, call.mean, call.variance) if found is None else _by(call, *found)


def _mixed(call: NormCall, alpha: float) -> Tensor:
    found = moments_of(call.x, unbiased=True)
    if found is None:
        return _by(call, call.mean, call.variance)
    return _by(call, call.mean.lerp(found[0], alpha), call.variance.lerp(found[1], alpha))
