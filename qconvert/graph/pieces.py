"""A graph divided into pieces that follow one another, so that only one at a time has its weights in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise

import onnx_ir
from onnx_ir import Graph, Node, Value
from onnx_ir.traversal import RecursiveGraphIterator

FLOAT32_BYTES = 4
# Of weights in float32, in a session, and in a piece where they are more: a model of up to 150 million is run whole.
WHOLE_BYTES, PIECE_BYTES = 600_000_000, 200_000_000


def weight_bytes(initializers: Iterable[Value]) -> int:
    """Return the bytes that initializers take in a session, in which narrow floats are widened to float32."""
    return sum(map(_nbytes, initializers))


def divide(model: onnx_ir.Model, most_bytes: int) -> list[onnx_ir.Model]:
    """Return models that compute what `model` does, if they are run one after the other, each on values of those before it.

    most_bytes: of the weights of a piece; a node with more is a piece of its own. Cuts are made where the fewest values cross,
    which in a stack of blocks is where one hidden state is handed on. What is computed of weights alone (a transpose, a
    cast) is in every piece that reads it.

    model: its nodes in an order in which they can be run. Values that cross keep their names.
    """
    chain = _Chain(model.graph)
    bounds = [0, *chain.cuts(most_bytes), len(chain.nodes)]
    if len(bounds) == 2:
        return [model]
    pieces = (onnx_ir.convenience.extract(model.graph, *chain.border(start, stop)) for start, stop in pairwise(bounds))
    return [onnx_ir.Model(piece, ir_version=model.ir_version, functions=list(model.functions.values())) for piece in pieces]


class _Chain:
    """The nodes of a graph that depend on its inputs, in their order.

    reads: what each of them reads, in its branches too.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.reads: list[list[Value]] = []
        fed = set(graph.inputs)
        for node in graph:
            read = list(_read_by(graph, node))
            if not fed.isdisjoint(read):
                fed.update(node.outputs)
                self.nodes.append(node)
                self.reads.append(read)
        self.fed = fed

    def border(self, start: int, stop: int) -> tuple[list[Value], list[Value]]:
        """Return what the nodes from `start` to before `stop` read of others, and what they give to others."""
        inside = {value for node in self.nodes[start:stop] for value in node.outputs}
        read = dict.fromkeys(value for values in self.reads[start:stop] for value in values)
        wanted = {value for values in self.reads[stop:] for value in values} | set(self.graph.outputs)
        given = (value for node in self.nodes[start:stop] for value in node.outputs)
        return [value for value in read if value in self.fed - inside], [value for value in given if value in wanted]

    def cuts(self, most_bytes: int) -> Iterator[int]:
        """Yield the place of each node that a piece begins with, but for the first."""
        crossing, weights = self._crossing(), [self._weights_read(values) for values in self.reads]
        start = 0
        while start < len(self.nodes):
            sizes = list(_total_bytes(weights[start:]))
            over = next((place for place, size in enumerate(sizes) if size > most_bytes), None)
            if over is None:
                return
            # In the fuller half of the piece, where the fewest values cross, as late as that is.
            places = [place for place in range(over) if sizes[place] > most_bytes / 2]
            if places:
                start += 1 + min(reversed(places), key=lambda place: crossing[start + place])
            else:  # a node that is too large stands alone
                start += over or 1
            if start < len(self.nodes):
                yield start

    def _crossing(self) -> list[int]:
        """Return how many values that a node has given are still read, behind each node."""
        last = {value: place for place, values in enumerate(self.reads) for value in values}
        change = [0] * len(self.nodes)
        for place, node in enumerate(self.nodes):
            for value in node.outputs:
                if value in last:
                    change[place] += 1
                    change[last[value]] -= 1
        return list(accumulate(change))

    def _weights_read(self, values: Iterable[Value]) -> set[Value]:
        """Return the initializers among `values`, and those that others are computed of which depend on nothing else."""
        found, seen, waiting = set(), set(self.fed), list(values)
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            producer = value.producer()
            if value.is_initializer():
                found.add(value)
            elif producer is not None:
                waiting.extend(_read_by(self.graph, producer))
        return found


def _read_by(graph: Graph, node: Node) -> Iterator[Value]:
    """Yield the values of `graph` that a node reads, with those that its branches read from outside."""
    inside = (each for attribute in node.attributes.values() for each in _branch_nodes(attribute))
    for each in (node, *inside):
        yield from (value for value in each.inputs if value is not None and value.graph is graph)


def _branch_nodes(attribute: onnx_ir.Attr) -> Iterator[Node]:
    if attribute.type == onnx_ir.AttributeType.GRAPH:
        yield from RecursiveGraphIterator(attribute.as_graph())


def _total_bytes(weights: Iterable[set[Value]]) -> Iterator[int]:
    """Yield how many bytes a piece holds with each further node; a weight that several read counts once."""
    held: set[Value] = set()
    total = 0
    for read in weights:
        total += weight_bytes(read - held)
        held |= read
        yield total


def _nbytes(initializer: Value) -> int:
    tensor = initializer.const_value
    if tensor is None:
        return 0
    return tensor.size * FLOAT32_BYTES if tensor.dtype.is_floating_point() else tensor.nbytes
