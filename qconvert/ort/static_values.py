"""What flows through a float graph at the values that static activations quantize."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir
from torch import Tensor

from qconvert.graph.float_graph import float_graph
from qconvert.graph.quantized_values import IsStatic, quantized_values
from qconvert.ir.model import Model
from qconvert.ir.template import Template
from qconvert.ort.pieces import sized_session
from qconvert.ort.session import Values, joined, memory_session, run_parts


class StaticValues:
    """The float graphs of a model, which show the values whose ranges are to be found.

    readers: part (see targets.graph_files) -> name of such a value in its graph -> the static layers that read its codes.
    """

    def __init__(self, model: Model, template: Template, is_static: IsStatic, read: Callable[[str], Tensor]) -> None:
        """read: gives a parameter, in float32 or narrower."""
        self.readers = {part: _roots(graph.graph, is_static) for part, graph in template.graphs.items()}
        floats = {part: float_graph(graph, model.parameter_shapes) for part, graph in template.graphs.items()}
        for part, graph in floats.items():
            _show(graph.graph, self.readers[part])
        open_piece = partial(memory_session, read=read)
        self.session = joined({part: sized_session(graph, open_piece) for part, graph in floats.items()})

    def run(self, inputs: Values) -> Mapping[str, Mapping[str, np.ndarray[Any, Any]]]:
        """Run the graphs: part -> value -> what it was."""
        values = run_parts(self.session, inputs)
        return {part: {name: values[part][name] for name in names} for part, names in self.readers.items()}


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
