"""What every test of a guard stands on."""

from __future__ import annotations

import pytest
import torch

from edge_adapt.bundle import Bundle
from edge_adapt.methods.protocol import Context
from edge_adapt.tail import Tail


@pytest.fixture
def context(device_bundle: Bundle) -> Context:
    tail = Tail(device_bundle)
    return Context(device_bundle, lambda: tail)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
