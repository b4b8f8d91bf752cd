"""Writing a bundle: its graphs, its statistics, its manifest, and the folder that appears as a whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from safetensors.numpy import save as save_safetensors

from edge_adapt.bundle import FULL, FULL_INT8, MANIFEST, SOURCE, TAIL, TRUNK, Manifest
from edge_adapt.delta import write_atomically
from edge_adapt.engines.torch_from_onnx import GraphModule
from edge_adapt.errors import ArtifactError, EdgeAdaptError
from edge_adapt.graph import shapes
from exporters.adapters import ADAPTERS
from exporters.cut import tail_of
from exporters.passes import without_traces
from exporters.sites import Folded

Array = NDArray[Any]


def save_graphs(folder: Path, network: onnx.ModelProto, folded: Folded, manifest: Manifest) -> None:
    """full.onnx, trunk.onnx and tail.pt2. Raises: ArtifactError if the tail cannot be exported."""
    from exporters.trunk import ported_trunk

    for name, graph in ((FULL, folded.model), (TRUNK, ported_trunk(folded, manifest.cut.tensor, manifest.tap_side))):
        written = without_traces(graph)
        onnx.checker.check_model(written, full_check=True)
        (folder / name).write_bytes(written.SerializeToString())
    dims = shapes(network)[manifest.cut.tensor]
    tail = GraphModule(tail_of(network, manifest.cut.tensor, dims)).eval()
    concrete = [int(dim) if isinstance(dim, int) else 7 for dim in dims[1:]]
    dynamic: dict[int, Any] = {0: torch.export.Dim("N", min=1, max=65536)}
    dynamic |= {place: torch.export.Dim.AUTO for place, dim in enumerate(dims) if place and not isinstance(dim, int)}
    try:
        program = torch.export.export(tail, (torch.zeros(2, *concrete),), dynamic_shapes=((dynamic,),))
    except EdgeAdaptError:
        raise
    except Exception as error:  # whatever torch.export raises
        raise ArtifactError(
            f"the tail cannot be exported: {type(error).__name__}: {str(error).splitlines()[0]}",
            remedy="choose a later cut",
        ) from error
    torch.export.save(program, folder / TAIL)


def finish(folder: Path, manifest: Manifest, source: dict[str, Array]) -> Manifest:
    """Write source statistics and the manifest with the hashes of everything else."""
    arrays = {
        name: np.ascontiguousarray(value, np.uint8 if value.dtype == np.uint8 else np.float32)
        for name, value in source.items()
    }
    (folder / SOURCE).write_bytes(save_safetensors(arrays))
    adapters = sorted(str(file.relative_to(folder)) for file in folder.glob(f"{ADAPTERS}/*.safetensors"))
    files = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in (FULL, *[FULL_INT8] * (manifest.quantised is not None), TRUNK, TAIL, SOURCE, *adapters)
    }
    made = manifest.model_copy(update={"files": files})
    text = json.dumps(made.model_dump(mode="json"), indent=1)
    write_atomically(folder / MANIFEST, text.encode())
    return made


@contextlib.contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place at the end, or disappears."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if out.exists():
            old = folder.with_name(f"{folder.name}-old")
            out.rename(old)
            folder.rename(out)
            shutil.rmtree(old)
        else:
            folder.rename(out)
    except OSError as error:
        raise ArtifactError(
            f"the bundle cannot be written to {out}: {error.strerror or error}", remedy="free space, or write elsewhere"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
