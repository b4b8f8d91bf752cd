"""A torch module -> an ONNX graph that still has its norm layers and its parameter names.

The exporter's own optimiser folds batch norm into the convolutions; ours come later and remember the sites. So only
constants are folded here.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from torch import nn

from edge_adapt.errors import ArtifactError, ConfigError

OPSET = 20
IMAGE, LOGITS, PROMPTS = "image", "logits", "prompts"


def export_network(module: nn.Module, example: torch.Tensor, *, prompt_width: int | None) -> onnx.ModelProto:
    """Export with a dynamic batch, batch norm unfolded.

    Args:
        module: network in eval mode, images [N, ...] -> logits [N, K].
        example: one or more input frames, float32.
        prompt_width: for a transformer whose forward takes `prompts` [P, width]: the width, else None.
    Raises: ArtifactError naming the operator and the module that cannot be exported.
    """
    if any(part.training for part in module.modules()):
        raise ConfigError(
            "the model is in training mode; its batch norms would silently be exported in another mode",
            remedy="call model.eval() in the factory",
        )
    batch = torch.export.Dim("N", min=1, max=65536)
    arguments: tuple[torch.Tensor, ...] = (torch.cat([example, example])[:2],)
    dynamic: tuple[Any, ...] = ({0: batch},)
    names = [IMAGE]
    if prompt_width is not None:
        arguments += (torch.zeros(2, prompt_width),)
        dynamic += ({0: torch.export.Dim("P", min=0, max=1024)},)
        names.append(PROMPTS)
    with _quiet(), torch.no_grad():
        program = _translate(module, arguments, dynamic, names)
    model: onnx.ModelProto = program
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ArtifactError(
                f"operator {node.op_type} of domain {node.domain!r} is not part of standard ONNX",
                remedy="replace it in the model by standard layers",
            )
    return model


def _translate(
    module: nn.Module, arguments: tuple[torch.Tensor, ...], dynamic: tuple[Any, ...], names: list[str]
) -> onnx.ModelProto:
    from onnxscript import optimizer

    try:
        captured = torch.export.export(module, arguments, dynamic_shapes=dynamic)
    except Exception as error:  # torch.export raises whatever the model's own code raised
        raise ArtifactError(
            f"torch.export cannot capture the model: {_first_line(error)}",
            remedy="remove data-dependent Python control flow from forward(), or export an .onnx yourself",
        ) from error
    try:
        program = torch.onnx.export(
            captured,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=names,
            output_names=[LOGITS],
        )
    except Exception as error:  # several private exception types, all mean the same
        raise ArtifactError(
            f"{_blame(captured, error)} cannot be exported to ONNX: {_first_line(_causes(error)[-1])}",
            remedy="replace that operator by standard layers, or export an .onnx yourself",
        ) from error
    if program is None:
        raise ArtifactError("the ONNX exporter returned nothing", remedy="check the installed onnxscript version")
    for _ in range(2):
        optimizer.inline(program.model)
        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
    model: onnx.ModelProto = program.model_proto
    return model


def _blame(captured: torch.export.ExportedProgram, error: BaseException) -> str:
    """Which operator, in which module: the exporter's message names only a node of its own graph."""
    failed = {name for cause in _causes(error) for name in re.findall(r"\bnode %(\w+)", str(cause))}
    for node in captured.run_decompositions().graph.nodes:  # as the exporter saw them
        if node.op == "call_function" and node.name in failed:
            stack = node.meta.get("nn_module_stack") or {}
            where = [f"{path or 'the model'} ({kind})" for path, kind in stack.values()]
            return f"operator {node.target} in module {where[-1] if where else 'the model'}"
    return "an operator of the model"


def _causes(error: BaseException) -> list[BaseException]:
    """The error, and what caused it, down to the first."""
    found = [error]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and logs a page at every call; none of it is for our user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
