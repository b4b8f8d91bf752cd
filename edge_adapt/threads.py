"""How many threads torch may use."""

from __future__ import annotations

import torch


def one_thread() -> None:
    """Beside a busy neighbour, torch's spinning threads wait for each other a hundred times longer than they work."""
    torch.set_num_threads(1)
