"""What commands say when they refuse, and models of a user to refuse."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

WRONG, INTERRUPTED = 2, 130
"""Exit codes."""

FACTORIES = """
import torch
from torch import nn


class Net(nn.Module):
    input_shape = (3, 8, 8)

    def __init__(self, body=None):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.body = body or nn.Identity()

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        x = self.body(x.mean(dim=(2, 3)))
        return self.head(x)


class Spectral(nn.Module):
    def forward(self, x):
        return x + torch.linalg.svdvals(x.unsqueeze(1))


class Eigen(nn.Module):
    def forward(self, x):
        return x + torch.linalg.eigvalsh(x.unsqueeze(2) @ x.unsqueeze(1))


class Shortcut(Net):
    def __init__(self):
        super().__init__()
        self.side = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = torch.relu(self.bn(self.conv(x))) + self.side(x)
        return self.head(y.mean(dim=(2, 3)))


def small():
    return Net().eval()


def spectral():
    return Net(Spectral()).eval()


def eigen():
    return Net(Eigen()).eval()


class Largest(nn.Module):
    def forward(self, x):
        return x + x.argmax(1, keepdim=True)


def largest():
    return Net(Largest()).eval()


def shortcut():
    return Shortcut().eval()


def no_shape():
    return nn.Linear(2, 2).eval()


def no_module():
    return 7
"""


def assert_clear(shown: str) -> None:
    assert "Traceback" not in shown
    assert len(re.findall(r"^error: ", shown, re.MULTILINE)) == 1, shown
    assert len(re.findall(r"^  try: .{3,}", shown, re.MULTILINE)) == 1, shown


def copy_of(bundle, folder: Path) -> Path:
    return Path(shutil.copytree(bundle.path, folder / "copy"))
