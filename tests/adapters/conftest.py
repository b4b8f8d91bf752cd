"""Tails of every kind of layer: convolutions, a linear head, matrix products of a transformer."""

from __future__ import annotations

import pytest
import torch

from edge_adapt.bundle import Bundle
from edge_adapt.tail import Tail


@pytest.fixture(scope="module", params=["device_bundle", "reference_bundle", "token_bundle"])
def bundle(request) -> Bundle:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def tail(bundle) -> Tail:
    return Tail(bundle)


@pytest.fixture
def h(bundle) -> torch.Tensor:
    """Eight tensors at the cut."""
    shape = bundle.manifest.cut.shape
    tokens = (17,) if bundle.manifest.prompts else ()
    return torch.randn(8, *tokens, *shape, generator=torch.Generator().manual_seed(1))
