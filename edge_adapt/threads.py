"""How many threads torch may use."""

from __future__ import annotations

import os
import sys


def one_thread() -> None:
    """Beside a busy neighbour, torch's spinning threads wait for each other a hundred times longer than they work.

    Holds for a torch that is imported later, too; it is not imported here, which takes seconds.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
