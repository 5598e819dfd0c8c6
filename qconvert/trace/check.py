"""The check that traced graphs compute what the model computes: the traced blocks are run both ways on real weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import onnx_ir
import torch
from torch import Tensor

from qconvert.execution import probes
from qconvert.execution.outputs import named_outputs
from qconvert.execution.wide_rows import as_parameter
from qconvert.graph.float_graph import float_graph
from qconvert.ir.finite import not_finite, require_finite
from qconvert.ir.model import Model
from qconvert.ort import compare
from qconvert.ort.fed_session import FedSession
from qconvert.ort.large_pieces import in_tiles
from qconvert.ort.pieces import sized_session
from qconvert.ort.session import joined
from qconvert.trace.opaque import original_name, shortened

# Relative to the largest |output|; float32 sums in another order differ by about 1e-6.
TOLERANCE = 1e-4


def reference(model: Model, blocks: list[str]) -> list[dict[str, Tensor]]:
    """Return what torch computes for each of the probes with only `blocks` kept: name of the graph's output -> tensor.

    Raises InputError QC-INPUT-014 for a model with outputs that no graph would have, and whatever the model raises.
    """
    module = shortened(model, blocks)
    for name, _ in list(module.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, as_parameter(model.read(original_name(name, blocks))))
    return [named_outputs(model.task, module, batch) for batch in probes.probes(model)]


def relative_error(
    model: Model, graphs: Mapping[str, onnx_ir.Model], blocks: list[str], expected: Sequence[Mapping[str, Tensor]]
) -> float:
    """Return the largest difference of traced graphs' outputs to torch's, relative to their largest value.

    Infinite if one is not finite.

    graphs: part -> graph; blocks: those that they hold; expected: their `reference`.

    Raises InputError QC-WEIGHT-001 if that is because a weight is not, QC-FLOAT-001 if it is so in torch as well.
    """
    open_piece = in_tiles(model.read, partial(FedSession, read=model.read))
    floats = {part: float_graph(graph, model.parameter_shapes) for part, graph in graphs.items()}
    session = joined({part: sized_session(graph, open_piece) for part, graph in floats.items()})
    error = compare.relative_error(model, session, [tuple(outputs.values()) for outputs in expected])
    if math.isinf(error):
        for name, _ in shortened(model, blocks).named_parameters():
            weight = original_name(name, blocks)
            require_finite(weight, model.read(weight))
        if not all(bool(torch.isfinite(output).all()) for outputs in expected for output in outputs.values()):
            raise not_finite("comes out of the float model for the inputs that its trace is checked on")
    return error
