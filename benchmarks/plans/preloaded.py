"""Imported once by the server that forks the processes of tasks: what a task would import, and nothing begun.

ONNX Runtime is left out, which starts a thread when it is imported: no thread outlives a fork.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from importlib import import_module

from edge_adapt.errors import EdgeAdaptError
from edge_adapt.plugins import METHODS, ROUTERS, WRAPPERS, find, names

MODULES = (
    *("benchmarks.plans.tasks", "benchmarks.replay", "benchmarks.plans.images"),
    *("edge_adapt.cli", "edge_adapt.tail", "onnx"),
    *("edge_adapt.streams.recorded", "edge_adapt.streams.recording", "edge_adapt.streams.corruptions.effects"),
    # What `torch.export.load` imports, for seconds, when it is first called.
    *("torch.export.pt2_archive._package", "torch._export.serde.serialize", "torch.export._trace"),
    *("torch.export._unlift", "torch._dynamo.precompile_context", "torch._inductor.output_code"),
    *("torch.fx.experimental.validator", "networkx", "sympy.tensor.tensor"),
)
for module in MODULES:
    with suppress(ImportError):
        import_module(module)
for group in (METHODS, WRAPPERS, ROUTERS):
    for name in names(group):
        with suppress(EdgeAdaptError):
            find(group, name)
gc.collect()
gc.freeze()  # tasks neither look at these objects again nor copy their pages
