"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


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
