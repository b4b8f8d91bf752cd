"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edge_adapt.bundle import Bundle, InputSpec
from edge_adapt.streams.data import Dataset
from exporters.export import export, from_module
from exporters.zoo.vit import VisionTransformer

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
TINY_INPUT = InputSpec(shape=(3, 16, 16), scale=255.0, mean=(0.5, 0.4, 0.6), std=(0.25, 0.2, 0.3))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two busy cores and spinning OpenMP threads make a test hundreds of times slower; one thread does not."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images and pretrained models, which are not part of this repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not found at ../shared/data (looked for {SHARED_DATA.name} beside the checkout)")
    return SHARED_DATA


class Residual(nn.Module):
    """conv-BN-ReLU, added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.bn(self.conv(x)))


class TinyNet(nn.Module):
    """Every kind of batch-norm site in a few hundred weights; [N, 3, 16, 16] -> [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = Residual()
        self.alone = nn.BatchNorm2d(8)  # behind an addition: no layer to fold it into
        self.depthwise, self.depthwise_bn = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point, self.point_bn = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.alone(self.block(self.stem(x))))
        x = torch.relu(self.depthwise_bn(self.depthwise(x)))
        x = torch.relu(self.point_bn(self.point(x)))
        made: Tensor = self.head(x.mean(dim=(2, 3)))
        return made


@pytest.fixture(scope="session")
def tiny_net() -> TinyNet:
    """In eval mode, with statistics and affines that are not the identity. Do not modify."""
    return made_tiny_net()


def made_tiny_net() -> TinyNet:
    """The same network each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = TinyNet().eval()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.data.uniform_(0.7, 1.3)
                part.bias.data.normal_(0, 0.2)
        net.train()
        with torch.no_grad():  # statistics of real activations, as training would leave them
            frames = torch.from_numpy(tiny_images(64)).permute(0, 3, 1, 2) / 255
            mean, std = (torch.tensor(value)[:, None, None] for value in (TINY_INPUT.mean, TINY_INPUT.std))
            for _ in range(30):
                net((frames - mean) / std)
            net.eval()
            net.head.weight.mul_(4)
            net.head.bias.sub_(net((frames - mean) / std).mean(dim=0))  # no class rules alone
        return net


def tiny_images(count: int) -> np.ndarray:
    """Smooth coloured patterns, uint8 [N, 16, 16, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (count, 4, 4, 3))
    fine = coarse.repeat(4, axis=1).repeat(4, axis=2) + rng.normal(0, 12, (count, 16, 16, 3))
    return np.clip(fine, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def tiny_data(tiny_net: TinyNet) -> Dataset:
    """128 images, labelled by the network itself, every fifth one wrongly."""
    from edge_adapt.preprocess import Preprocess

    images = tiny_images(128)
    with torch.no_grad():
        labels = tiny_net(torch.from_numpy(Preprocess(TINY_INPUT)(images))).argmax(1).numpy()
    labels[::5] = (labels[::5] + 1) % 5
    return Dataset("tiny", images, labels)


@pytest.fixture(scope="session")
def tiny_frames(tiny_data: Dataset) -> np.ndarray:
    """The images as the network is fed, [128, 3, 16, 16] float32."""
    from edge_adapt.preprocess import Preprocess

    assert tiny_data.images is not None
    return Preprocess(TINY_INPUT)(tiny_data.images)


def tiny_bundle(net: nn.Module, images: np.ndarray, folder: Path, cut: str) -> Bundle:
    """Exported and loaded."""
    model = from_module(net, "tiny", TINY_INPUT, classes=[f"class-{index}" for index in range(5)])
    return Bundle.load(export(model, folder, calibration=images, cut=cut))


@pytest.fixture(scope="session")
def device_bundle(tiny_net: TinyNet, tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny network cut behind its residual block. Do not modify its files."""
    return tiny_bundle(tiny_net, tiny_data.images, tmp_path_factory.mktemp("bundles") / "device", "block")


@pytest.fixture(scope="session")
def reference_bundle(tiny_net: TinyNet, tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny network cut at its input. Do not modify its files."""
    return tiny_bundle(tiny_net, tiny_data.images, tmp_path_factory.mktemp("bundles") / "reference", "input")


@pytest.fixture(scope="session")
def token_bundle(tmp_path_factory) -> Bundle:
    """A transformer of two blocks, cut between them. Do not modify its files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = VisionTransformer(image=16, patch=4, dim=16, depth=2, heads=2, classes=5).eval()
    model = from_module(net, "tokens", InputSpec(shape=(3, 16, 16)), cut="blocks.0", prompt_width=16)
    frames = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3)).astype(np.uint8)
    return Bundle.load(export(model, tmp_path_factory.mktemp("tokens") / "b", calibration=frames, cut="blocks.0"))
