"""What a user gets who names no method: the best trade of error, time and harm for the bundle at hand."""

from __future__ import annotations

from edge_adapt.bundle import Bundle

AUTO = "auto"


def choose(bundle: Bundle) -> str:
    """The composition of methods that `auto` stands for; measured in `benchmarks/results`.

    Where there are norms, their statistics are most of what a shift breaks, and setting them costs no gradients. A
    bundle that was warmed up at export bears learning on top of that, and gains by it; others hardly do.
    """
    manifest = bundle.manifest
    if not manifest.sites:
        # Around the frozen model label_shift has to know the classes' features, to tell damage from label shift.
        return "source+label_shift" if "class.mean" in bundle.source else "source"
    host = "moments"
    return f"{host}+label_shift" if manifest.head is not None else host
