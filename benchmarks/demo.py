"""The demo: real handwritten digits, a small network trained in seconds, and the whole road from export to report."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn

from benchmarks.replay import Progress, Replay, replay
from edge_adapt.bundle import Bundle, InputSpec
from edge_adapt.delta import write_atomically
from edge_adapt.preprocess import Preprocess
from edge_adapt.streams.corruptions import corrupt
from edge_adapt.streams.data import Dataset, digits
from exporters.export import export, from_module

Array = NDArray[Any]
Report = Callable[[str], None]

INPUT = InputSpec(shape=(1, 32, 32), scale=255.0, mean=(0.5,), std=(0.5,))
SHIFTS = (
    *("gaussian_noise", "impulse_noise", "defocus_blur", "motion_blur"),
    *("snow", "fog", "brightness", "contrast", "elastic_transform", "pixelate"),
)
METHODS = ("source", "moments", "tent", "cotta")
EPOCHS, BATCH = 12, 32
WEATHER = ("fog", "gaussian_noise", "contrast", "snow")
SEVERITY, STRETCH = 5, 450
"""Of the agent's stream: frames of each stretch, and how bad the weather is."""


class DigitNet(nn.Module):
    """Five convolutions with batch norm; [N, 1, 32, 32] -> [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((1, 16, 2), (16, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after, stride in widths
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        made: Tensor = self.head(x.mean(dim=(2, 3)))
        return made


def run(progress: Progress, report: Report, *, limit: int | None = None) -> dict[str, Any]:
    """Train on one half of the digits (or take what was trained before), export, replay the other half."""
    train, test = _halves()
    bundle = _bundle(train, progress, report)
    plan = Replay(methods=METHODS, batch_size=32, corruptions=SHIFTS, limit=limit)
    return replay(bundle, test, plan, progress=progress)


def weather(progress: Progress, report: Report) -> tuple[Path, dict[str, Array]]:
    """For an agent: the same network as a bundle that tells its accuracy without labels too, and the other half of the
    digits in changing weather."""
    train, test = _halves()
    bundle = _bundle(train, progress, report, estimate=True)
    assert test.images is not None
    parts = {"clean": test.images[:STRETCH]}
    for number, shift in enumerate(WEATHER):
        parts[shift] = corrupt(test.images[:STRETCH], shift, SEVERITY, seed=number)
    return bundle.path, parts


def _halves() -> tuple[Dataset, Dataset]:
    """To train on, and to test with."""
    data = digits()
    order = np.random.default_rng(0).permutation(len(data))
    half = len(data) // 2
    return _part(data, order[:half]), _part(data, order[half:])


def cache_folder() -> Path:
    """Where trained weights and the bundle are kept: $XDG_CACHE_HOME/edge-adapt or ~/.cache/edge-adapt."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "edge-adapt"


def _bundle(train: Dataset, progress: Progress, report: Report, *, estimate: bool = False) -> Bundle:
    assert train.images is not None
    net = _trained(train, progress, report)
    folder = cache_folder() / ("demo-agent-bundle" if estimate else "demo-bundle")
    report("exporting")
    model = from_module(net, "digits-cnn", INPUT, classes=[str(digit) for digit in range(10)])
    export(
        model,
        folder,
        calibration=train.images,
        cut="blocks.2",
        estimate=estimate,
        force=True,
        report=lambda text: report(f"  {text}"),
        progress=progress,
    )
    return Bundle.load(folder)


def _trained(train: Dataset, progress: Progress, report: Report) -> DigitNet:
    """The network, trained once; the cache is keyed by the code that trains it."""
    torch.manual_seed(0)
    net = DigitNet()
    text = inspect.getsource(DigitNet) + inspect.getsource(_fit) + f"{EPOCHS} {BATCH} {torch.__version__}"
    file = cache_folder() / f"demo-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"
    if file.exists():
        net.load_state_dict(load_file(file))
        report(f"weights from {file}")
        return net.eval()
    _fit(net, train, progress)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, save(net.state_dict()))
    return net.eval()


def _fit(net: nn.Module, train: Dataset, progress: Progress) -> None:
    """Cross-entropy, Adam with one cycle, digits moved by up to three pixels."""
    assert train.images is not None and train.labels is not None
    x = torch.from_numpy(Preprocess(INPUT)(train.images))
    y = torch.from_numpy(train.labels)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    net.train()
    for epoch in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(x), generator=generator), BATCH):
            moves = torch.randint(-3, 4, (2,), generator=generator).tolist()
            batch = torch.roll(x[rows], moves, dims=(2, 3))
            loss = F.cross_entropy(net(batch), y[rows])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
        progress("training", epoch + 1, EPOCHS)


def _part(data: Dataset, rows: Array) -> Dataset:
    assert data.images is not None and data.labels is not None
    return Dataset(data.name, data.images[rows], data.labels[rows])
