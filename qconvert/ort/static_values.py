"""Float graphs run for static activations: what flows at the values that become codes, and what rounding them changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir
from torch import Tensor

from qconvert.graph.float_graph import float_graph
from qconvert.graph.quantized_values import IsStatic, quantized_values
from qconvert.graph.rounded_graph import rounded_graph
from qconvert.ir.activation_codes import GraphCodes
from qconvert.ir.model import Model
from qconvert.ir.template import Template
from qconvert.ort.pieces import sized_session
from qconvert.ort.session import Values, joined, memory_session, run_parts


class StaticValues:
    """The float graphs of a model, which show the values whose ranges are to be found.

    shown: part (see targets.graph_files) -> names of these values in its graph.
    """

    def __init__(
        self, model: Model, template: Template, shown: Mapping[str, Collection[str]], read: Callable[[str], Tensor]
    ) -> None:
        """read: gives a parameter, in float32 or narrower."""
        self.shown = shown
        floats = {part: float_graph(graph, model.parameter_shapes) for part, graph in template.graphs.items()}
        for part, graph in floats.items():
            _show(graph.graph, shown[part])
        open_piece = partial(memory_session, read=read)
        self.session = joined({part: sized_session(graph, open_piece) for part, graph in floats.items()})

    def run(self, inputs: Values) -> Mapping[str, Mapping[str, np.ndarray[Any, Any]]]:
        """Run the graphs: part -> value -> what it was."""
        values = run_parts(self.session, inputs)
        return {part: {name: values[part][name] for name in names} for part, names in self.shown.items()}


def coded_roots(template: Template, is_static: IsStatic) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the values whose ranges are to be found: part -> name of the value -> the static layers that read its codes."""
    return {part: _roots(graph.graph, is_static) for part, graph in template.graphs.items()}


def coded_values(template: Template, is_static: IsStatic) -> dict[str, list[str]]:
    """Return the names of all values that are written as codes by part, those among them that are only moved as well."""
    return {
        part: [str(found.value.name) for found in quantized_values(graph.graph, is_static)]
        for part, graph in template.graphs.items()
    }


def rounded_session(
    model: Model, template: Template, is_static: IsStatic, codes: GraphCodes, read: Callable[[str], Tensor]
) -> Any:
    """Open a session over the float graphs with static activations rounded to their codes (graph/rounded_graph.py).

    read: as StaticValues has it; weights that are to be rounded, too, come from there.
    """
    open_piece = partial(memory_session, read=read)
    shapes = model.parameter_shapes
    return joined(
        {
            part: sized_session(rounded_graph(graph, shapes, is_static, codes.get(part, {})), open_piece)
            for part, graph in template.graphs.items()
        }
    )


def _roots(graph: onnx_ir.Graph, is_static: IsStatic) -> dict[str, tuple[str, ...]]:
    roots: dict[str, tuple[str, ...]] = {}
    for found in quantized_values(graph, is_static):
        name = str(found.root.name)
        roots[name] = (*roots.get(name, ()), *found.layers)
    return roots


def _show(graph: onnx_ir.Graph, names: Iterable[str]) -> None:
    """Make values outputs of the graph, where they are neither that nor inputs."""
    shown = {value.name for value in (*graph.inputs, *graph.outputs)}
    made = {value.name: value for node in graph for value in node.outputs}
    graph.outputs.extend(made[name] for name in names if name not in shown)
