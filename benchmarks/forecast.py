"""Forecasting: a small frozen model in ONNX Runtime, and ADCSD that corrects it as the truth comes in.

The model is trained on the first weeks of a series and never again; the rest is the stream, one forecast a step.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.environment import environment
from benchmarks.replay import SCHEMA
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.methods.adcsd import ADCSD, ADCSDConfig
from exporters.onnx_from_torch import export_network

Array = NDArray[Any]
Progress = Callable[[str, int, int], None]
"""Told (what, steps done, steps in all)."""

PARTS = 20
"""Points of an error curve."""


@dataclass(frozen=True)
class Series:
    """Several series of numbers, one value each a step."""

    name: str
    values: Array
    """[steps, N] float32, NaN where there was no reading."""
    past: int
    """Steps that the model sees."""
    ahead: int
    """Steps that it forecasts."""
    train: int
    """Steps of the source period."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What to run."""

    epochs: int = 15
    batch: int = 64
    width: int = 128
    seed: int = 0
    limit: int | None = None
    """Forecasts of the stream."""
    adcsd: ADCSDConfig = field(default_factory=ADCSDConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more", remedy="use the default")


class Forecaster(nn.Module):
    """The last value, and what two layers add to it: [B, past, N] -> [B, ahead, N], standardised."""

    def __init__(self, series: int, past: int, ahead: int, width: int) -> None:
        super().__init__()
        self.series, self.ahead = series, ahead
        self.hidden = nn.Linear(past * series, width)
        self.middle = nn.Linear(width, width)
        self.out = nn.Linear(width, ahead * series)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.middle(torch.relu(self.hidden(x.flatten(1)))))
        made: Tensor = x[:, -1:] + self.out(hidden).unflatten(1, (self.ahead, self.series))
        return made


def load_series(path: Path) -> Series:
    """METR-LA speeds (`speed`, `missing`) or an ETT file (`values`), as .npz.

    METR-LA: one hour ahead from one hour, trained on four weeks of 5-minute steps. ETT: one day ahead from four days,
    trained on twenty weeks of hours.
    Sources: Li et al., DCRNN, ICLR 2018; Zhou et al., Informer, AAAI 2021.
    Raises: DataError.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in ("speed", "missing", "values")}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no readable .npz archive: {error}", remedy="check the path") from error
    if "speed" in arrays:
        speed = arrays["speed"].astype(np.float32)
        missing = arrays.get("missing", speed == 0)
        return Series(path.stem, np.where(missing, np.float32(np.nan), speed), past=12, ahead=12, train=28 * 288)
    if "values" in arrays:
        return Series(path.stem, arrays["values"].astype(np.float32), past=96, ahead=24, train=20 * 7 * 24)
    raise DataError(f"{path} holds neither `speed` nor `values`", remedy="give a METR-LA or an ETT archive")


def forecast(
    series: Series, plan: Forecast, *, progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Train, freeze, and play the rest of the series twice: as the model says it, and corrected.

    Returns: rows `frozen` and `adcsd` with MAE and RMSE over all steps ahead, in the series' units, where there are
    readings.
    """
    if len(series.values) < series.train + series.past + 2 * series.ahead:
        raise DataError(
            f"{series.name} has {len(series.values)} steps, {series.train} of them to train on: too few are left",
            remedy="give a longer series",
        )
    source = series.values[: series.train]
    mean, std = np.nanmean(source, axis=0), np.nanstd(source, axis=0) + 1e-6
    scaled = (_filled(series.values, mean) - mean) / std
    session = _session(_trained(scaled[: series.train], series, plan, progress))
    starts = range(series.train, len(scaled) - series.past - series.ahead + 1)
    starts = starts[: plan.limit] if plan.limit else starts
    method = ADCSD((series.ahead, scaled.shape[1], 1), mean=mean[:, None], std=std[:, None], config=plan.adcsd)
    state = method.init()
    errors: dict[str, list[Array]] = {"frozen": [], "adcsd": []}
    seconds = {"frozen": 0.0, "adcsd": 0.0}
    for done, start in enumerate(starts):
        now = start + series.past
        begun = time.perf_counter()
        (out,) = session.run(None, {session.get_inputs()[0].name: scaled[None, start:now].astype(np.float32)})
        plain = (out[0] * std + mean).astype(np.float32)
        answered = time.perf_counter()
        # The oldest forecast that waits was made `ahead` steps ago; its last true value came just now.
        known = series.values[now - series.ahead : now, :, None] if len(state.waiting) == series.ahead else None
        step = method.step(state, plain[..., None], known)
        state = step.state
        seconds["frozen"] += answered - begun
        seconds["adcsd"] += time.perf_counter() - begun
        truth = series.values[now : now + series.ahead]
        errors["frozen"].append(plain - truth)
        errors["adcsd"].append(step.forecast[..., 0] - truth)
        progress("forecasting", done + 1, len(starts))
    rows = [_row(name, np.stack(parts), seconds[name] / len(starts)) for name, parts in errors.items()]
    return {
        "schema": SCHEMA,
        "data": series.name,
        "settings": {
            "past": series.past,
            "ahead": series.ahead,
            "train_steps": series.train,
            "seed": plan.seed,
            "limit": plan.limit,
            "adcsd": asdict(plan.adcsd),
        },
        "environment": environment(1, f"onnxruntime {ort.__version__}"),
        "forecasts": len(starts),
        "updates": state.updates,
        "rows": rows,
    }


def _row(name: str, errors: Array, seconds: float) -> dict[str, Any]:
    """errors: [forecasts, ahead, N], NaN where there was no reading."""
    parts = np.array_split(errors, min(PARTS, len(errors)))
    return {
        "method": name,
        "mae": round(float(np.nanmean(np.abs(errors))), 4),
        "rmse": round(float(np.sqrt(np.nanmean(np.square(errors, dtype=np.float64)))), 4),
        "ms": round(seconds * 1e3, 4),
        "timeline": [round(float(np.nanmean(np.abs(part))), 4) for part in parts if np.isfinite(part).any()],
    }


def _filled(values: Array, mean: Array) -> Array:
    """Gaps take the last reading of their series, or its mean where there was none yet: nothing from the future."""
    rows = np.where(np.isfinite(values), np.arange(len(values))[:, None], -1)
    last = np.maximum.accumulate(rows, axis=0)
    found: Array = np.take_along_axis(values, np.maximum(last, 0), axis=0)
    return np.where(last < 0, mean, found)


def _trained(scaled: Array, series: Series, plan: Forecast, progress: Progress) -> Forecaster:
    """Mean absolute error, Adam with one cycle; the same seed gives the same model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        net = Forecaster(scaled.shape[1], series.past, series.ahead, plan.width)
    # Readings that are missing were filled in; they are forecast like others, but do not count.
    known = torch.from_numpy(np.isfinite(series.values[: series.train]))
    data = torch.from_numpy(scaled.astype(np.float32))
    count = len(data) - series.past - series.ahead + 1
    windows = data.unfold(0, series.past + series.ahead, 1).transpose(1, 2)[:count]
    masks = known.unfold(0, series.past + series.ahead, 1).transpose(1, 2)[:count, series.past :]
    generator = torch.Generator().manual_seed(plan.seed)
    optimiser = torch.optim.Adam(net.parameters())
    steps = plan.epochs * -(-count // plan.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for epoch in range(plan.epochs):
        for rows in torch.split(torch.randperm(count, generator=generator), plan.batch):
            window = windows[rows]
            error = (net(window[:, : series.past]) - window[:, series.past :]).abs() * masks[rows]
            optimiser.zero_grad()
            torch.autograd.backward(error.sum() / masks[rows].sum().clamp_min(1))
            optimiser.step()
            schedule.step()
        progress("training", epoch + 1, plan.epochs)
    return net.eval()


def _session(net: Forecaster) -> ort.InferenceSession:
    """The frozen model in the engine that devices have."""
    example = torch.zeros(1, net.hidden.in_features // net.series, net.series)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    graph = export_network(net, example, prompt_width=None)
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
