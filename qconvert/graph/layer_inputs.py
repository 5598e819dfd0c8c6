"""The values that layers read, where each layer was trained with codes for what it reads itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from onnx_ir import Graph, Node, Value

from qconvert.graph.quantized_values import PASSES, IsStatic, QuantizedValue, is_opaque_product
from qconvert.ir.template import made_by, module_of


class LayerInput(NamedTuple):
    """A value that layers read. layers: their modules; made_by: ONNX type of the node that gives it."""

    layers: tuple[str, ...]
    made_by: str | None


def inputs_of_layers(graphs: Iterable[Graph]) -> Iterator[LayerInput]:
    """Yield every value that linears or convolutions read."""
    for graph in graphs:
        for value, nodes in _readers(graph, lambda name: True).items():
            yield LayerInput(tuple(dict.fromkeys(map(module_of, nodes))), made_by(value))


def layer_inputs(graph: Graph, is_layer: IsStatic) -> list[QuantizedValue]:
    """Return the values of a template's graph that layers read, in the order in which they are made.

    is_layer: whether a layer counts, by the name of its module.

    Where a value is only moved, or chosen among others, on its way to the layers (a pool of largest values, say), so is its
    code: codes are then made before that, where a convolution can give them.
    """
    found = []
    for value, nodes in _readers(graph, is_layer).items():
        names = tuple(dict.fromkeys(map(module_of, nodes)))
        readers: tuple[Node, ...] = tuple(nodes)
        path = [value]
        while (before := _moved(path[-1])) is not None:
            path.append(before)
        root = path[-1]
        for reader, each in zip((None, *path), path, strict=False):
            own = readers if reader is None else (reader.producer(),)
            found.append(QuantizedValue(each, root, tuple(filter(None, own)), names if each is value else ()))
    order = {value: place for place, value in enumerate((*graph.inputs, *(v for node in graph for v in node.outputs)))}
    return sorted(found, key=lambda each: order[each.value])


def _readers(graph: Graph, is_layer: IsStatic) -> dict[Value, list[Node]]:
    readers: dict[Value, list[Node]] = {}
    for node in graph:
        if is_opaque_product(node) and is_layer(module_of(node)):
            assert node.inputs[0] is not None
            readers.setdefault(node.inputs[0], []).append(node)
    return readers


def _moved(value: Value) -> Value | None:
    """The value that an operator of PASSES moves to give this one, which nothing else reads; else None."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in PASSES:
        return None
    before = node.inputs[0]
    if before is None or before.is_initializer() or len(before.uses()) > 1 or before.is_graph_output():
        return None
    return before
