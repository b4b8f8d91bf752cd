"""ADCSD: correct the output of a frozen forecaster, season and trend apart, from truth that comes late.

Guo et al., "Online Test-Time Adaptation of Spatial-Temporal Traffic Flow Forecasting" (ADCSD), 2024. It corrects a
regressor and needs the true values once they are known, so it is no classification method: it has a config, a state
that is a value, and a pure step, but no bundle, and no port.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edge_adapt.errors import ConfigError, DataError
from edge_adapt.methods.optim import AdamState, Tensors, adam, all_finite, gradients_of, leaves

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ADCSDConfig:
    """Defaults as published."""

    lr: float = 1e-4
    """Of Adam."""
    width: int = 128
    """Hidden units of each corrector."""
    window: int = 5
    """Steps of the moving average that is the trend; odd."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.window % 2 == 0:
            raise ConfigError(f"window is {self.window}, expected an odd number", remedy="5 is the published value")
        if self.width < 1 or self.lr < 0:
            raise ConfigError(f"width {self.width}, lr {self.lr}: neither may be negative", remedy="use the defaults")


@dataclass(frozen=True)
class ADCSDState:
    """Everything, whatever the length of the series: the correctors, Adam, and forecasts whose truth is not known."""

    values: Tensors
    adam: AdamState = field(default_factory=AdamState)
    waiting: tuple[Array, ...] = ()
    """Forecasts [T, N, C] of the frozen model, the oldest first, at most T."""
    updates: int = 0


@dataclass(frozen=True)
class Corrected:
    """What a step leaves behind."""

    forecast: Array
    """[T, N, C], corrected with what was known before this step."""
    state: ADCSDState
    events: tuple[str, ...] = ()


class ADCSD:
    """y = f + lambda1 * g1(season) + lambda2 * g2(trend), for the forecast f of a frozen model.

    Args:
        shape: (T, N, C): steps ahead, series, channels of one forecast.
        mean, std: [N, C] or numbers, of the series in the source period; the correctors see standardised values.
        seed: of the correctors' random start.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        mean: Array | float = 0.0,
        std: Array | float = 1.0,
        config: ADCSDConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.shape, self.config, self.seed = shape, config or ADCSDConfig(), seed
        self.mean = torch.as_tensor(np.asarray(mean, np.float32))
        self.std = torch.as_tensor(np.asarray(std, np.float32))
        if not bool((self.std > 0).all()):
            raise ConfigError("std has numbers that are not positive", remedy="leave out series that never move")

    def init(self) -> ADCSDState:
        """Both lambdas are 0: the first forecasts are the frozen model's."""
        steps, series, channels = self.shape
        width = self.config.width
        generator = torch.Generator().manual_seed(self.seed)
        values: dict[str, Tensor] = {}
        for part in ("season", "trend"):
            for layer, (out, into) in {"in": (width, channels), "out": (channels, width)}.items():
                bound = into**-0.5
                values[f"{part}.{layer}.weight"] = _uniform((out, into), bound, generator)
                values[f"{part}.{layer}.bias"] = _uniform((out,), bound, generator)
            values[f"{part}.norm.weight"] = torch.ones(steps, series, width)
            values[f"{part}.norm.bias"] = torch.zeros(steps, series, width)
            values[f"{part}.lambda"] = torch.zeros(series, 1)
        return ADCSDState(values)

    def correct(self, state: ADCSDState, forecast: Array) -> Array:
        """The forecast [T, N, C] with the state's correction; changes nothing."""
        with torch.no_grad():
            made: Array = self._corrected(state.values, torch.from_numpy(self._checked(forecast))).numpy()
        return made

    def step(self, state: ADCSDState, forecast: Array, truth: Array | None = None) -> Corrected:
        """Correct one forecast, then learn from an older one if its truth came.

        Args:
            forecast: [T, N, C] of the frozen model.
            truth: [T, N, C], what really came where `state.waiting[0]` was the forecast; NaN where there was no
                reading. None before T forecasts wait.
        Raises: DataError if a shape is another one, if the forecast is not finite, or if nothing waits for the truth.
        """
        forecast = self._checked(forecast)
        answer = self.correct(state, forecast)
        if truth is None:
            return Corrected(answer, replace(state, waiting=(*state.waiting, forecast)))
        if not state.waiting:
            raise DataError("truth came and no forecast waits for it", remedy="give None until T forecasts were made")
        oldest, waiting = state.waiting[0], (*state.waiting[1:], forecast)
        learned, events = self._learned(state, oldest, self._shaped(truth, "the truth"))
        return Corrected(answer, replace(learned, waiting=waiting), events)

    def _learned(self, state: ADCSDState, forecast: Array, truth: Array) -> tuple[ADCSDState, tuple[str, ...]]:
        """One step of Adam down the mean absolute error, in original units, of the readings that there are."""
        known = torch.from_numpy(np.isfinite(truth))
        if not bool(known.any()):
            return state, ()
        expected = torch.from_numpy(np.nan_to_num(truth))
        values = leaves(state.values)
        error = (self._corrected(values, torch.from_numpy(forecast)) - expected).abs()
        moved, moments = adam(values, gradients_of(error[known].mean(), values), state.adam, lr=self.config.lr)
        if not all_finite(moved, moments.first, moments.second):
            return state, ("refused: the step is not finite",)
        return replace(state, values=moved, adam=moments, updates=state.updates + 1), ()

    def _corrected(self, values: Mapping[str, Tensor], forecast: Tensor) -> Tensor:
        scaled = (forecast - self.mean) / self.std
        trend = _moving_average(scaled, self.config.window)
        season = scaled - trend
        made = scaled
        for part, given in (("season", season), ("trend", trend)):
            hidden = F.linear(given, values[f"{part}.in.weight"], values[f"{part}.in.bias"])
            hidden = F.layer_norm(hidden, hidden.shape, values[f"{part}.norm.weight"], values[f"{part}.norm.bias"])
            out = F.linear(F.gelu(hidden), values[f"{part}.out.weight"], values[f"{part}.out.bias"])
            made = made + values[f"{part}.lambda"] * out
        # Not through the scaling and back, so that lambda = 0 gives the very forecast.
        return forecast + (made - scaled) * self.std

    def _checked(self, forecast: Array) -> Array:
        forecast = self._shaped(forecast, "the forecast")
        if not np.isfinite(forecast).all():
            raise DataError("the forecast holds NaN or infinite values", remedy="fill gaps in the model's input")
        return forecast

    def _shaped(self, values: Array, what: str) -> Array:
        if values.shape != self.shape:
            raise DataError(f"{what} has shape {values.shape}, expected {self.shape}", remedy="give [T, N, C]")
        return values.astype(np.float32)


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


def _moving_average(values: Tensor, window: int) -> Tensor:
    """[T, N, C] averaged over T, both ends repeated."""
    half = window // 2
    padded = torch.cat([values[:1].expand(half, -1, -1), values, values[-1:].expand(half, -1, -1)])
    return padded.unfold(0, window, 1).mean(dim=-1)
