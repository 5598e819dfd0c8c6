"""A KV cache in int8 codes: GroupQueryAttention writes keys and values as round(x / scale) and reads them back as code * scale.

Scales are one per head and channel, [1, heads, 1, head size], because tokens share them: the operator has no others.

Its kernel for codes takes four times as long as the float one for the tokens of a prompt (ONNX Runtime 1.31.1). So a prompt
that meets an empty cache is attended to in float, and its keys and values are rounded afterwards: `If` chooses in each run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir
from onnx_ir import DataType, Graph, Node, TensorType, Value

from qconvert.graph.phases import bodies_of
from qconvert.graph.values import constant, input_named
from qconvert.ir.graph_names import is_cache

ATTENTION = "GroupQueryAttention"
# Places among its inputs: the caches of keys and values, the sines of its rotation, the scales of both caches.
PAST, SINES, SCALES = (3, 4), 8, (12, 13)
HOW = ("k_quant_type", "v_quant_type", "kv_cache_bit_width")
# Largest code: they lie around 0 alike.
LARGEST = 127
FIRST_RUN = "qconvert/first_run"


@dataclass(frozen=True, slots=True, eq=False)
class CachedAttention:
    """An attention that reads a cache.

    node: the operator on that cache. place: the node of the graph that gives its outputs: the operator itself, or the `If` that
    takes it for all runs but the first.
    """

    node: Node
    place: Node

    @property
    def caches(self) -> list[tuple[Value, Value]]:
        """The cache that goes in and the one that comes out: of keys, then of values."""
        return list(zip(_past(self.node), self.place.outputs[1:3], strict=True))

    @property
    def has_codes(self) -> bool:
        """Whether its caches are in codes."""
        return HOW[0] in self.node.attributes

    @property
    def begins_in_float(self) -> bool:
        """Whether a prompt that meets an empty cache is attended to in float."""
        return self.place is not self.node

    @property
    def rotated_pairs(self) -> int:
        """How many pairs of a key's channels the operator rotates: channel i goes with i + that number. 0 where it leaves that
        to the graph before it, which may pair them otherwise."""
        sines = self.node.inputs[SINES] if len(self.node.inputs) > SINES and "do_rotary" in self.node.attributes else None
        if sines is None or sines.shape is None:
            return 0
        pairs = sines.shape[1]
        assert isinstance(pairs, int)
        return pairs


def cached_attentions(graph: Graph) -> list[CachedAttention]:
    """Return the attentions that read a cache, in the order of the graph."""
    found = ((_operator(node), node) for node in graph)
    return [CachedAttention(operator, node) for operator, node in found if operator is not None and _past(operator)]


def is_all_cached(graph: Graph) -> bool:
    """Return whether the graph has caches, and all of them are read by attentions that may hold them in codes."""
    held = {past for attention in cached_attentions(graph) for past, _ in attention.caches}
    caches = {value for value in graph.inputs if is_cache(str(value.name))}
    return bool(caches) and caches == held


def has_cache_codes(graph: Graph) -> bool:
    """Return whether the caches of a graph are in codes."""
    return any(attention.has_codes for attention in cached_attentions(graph))


def write_cache_codes(graph: Graph, scale_of: Callable[[str], Value]) -> None:
    """Let the caches of a graph be codes, in place. scale_of: gives the scales of a cache by the name of its input.

    The graph is then a decoder's as it ships: nothing may be fused with its attentions afterwards.
    """
    first_run = _first_run(graph)
    for attention in cached_attentions(graph):
        node, caches = attention.node, attention.caches
        scales = [scale_of(str(past.name)) for past, _ in caches]
        for value in (value for cache in caches for value in cache):
            value.type = TensorType(DataType.INT8)
        branches = {"then_branch": _float_branch(node, scales), "else_branch": _coded_branch(node, scales)}
        choice = onnx_ir.node("If", [first_run], branches, num_outputs=3, name=f"{node.name}/by_cache")
        _put(graph, node, choice)


def drop_cache_codes(graph: Graph) -> None:
    """Let caches in codes be float again, in place; in the bodies of a graph too."""
    for body in (graph, *bodies_of(graph)):
        for attention in [attention for attention in cached_attentions(body) if attention.has_codes]:
            node = attention.node
            for value in (value for cache in attention.caches for value in cache):
                value.type = TensorType(DataType.FLOAT)
            attributes = [value for name, value in node.attributes.items() if name not in HOW]
            inputs = list(node.inputs[: SCALES[0]])
            _put(body, attention.place, Node(node.domain, ATTENTION, inputs, attributes, num_outputs=3, name=node.name))
    for value in graph.outputs:  # what a choice between bodies gives
        if is_cache(str(value.name)) and value.dtype == DataType.INT8:
            value.type = TensorType(DataType.FLOAT)


def _first_run(graph: Graph) -> Value:
    """A value that tells whether the run at hand meets an empty cache: all tokens that there are are its own."""
    ids, mask = (input_named(graph, name) for name in ("input_ids", "attention_mask"))
    lengths = [
        onnx_ir.node("Shape", [value], {"start": 1, "end": 2}, name=f"{FIRST_RUN}/{value.name}") for value in (ids, mask)
    ]
    equal = onnx_ir.node("Equal", [node.outputs[0] for node in lengths], name=f"{FIRST_RUN}/equal")
    only = onnx_ir.node("Squeeze", [equal.outputs[0]], name=FIRST_RUN)
    graph.insert_before(graph[0], [*lengths, equal, only])
    only.outputs[0].name = FIRST_RUN
    return only.outputs[0]


def _coded_branch(node: Node, scales: list[Value]) -> Graph:
    """The attention on caches in codes."""
    how = [onnx_ir.AttrString(HOW[0], "PER_CHANNEL"), onnx_ir.AttrString(HOW[1], "PER_CHANNEL"), onnx_ir.AttrInt64(HOW[2], 8)]
    inputs = [*node.inputs, *[None] * (SCALES[0] - len(node.inputs)), *scales]
    coded = Node(node.domain, ATTENTION, inputs, [*node.attributes.values(), *how], num_outputs=3, name=f"{node.name}/codes")
    return _branch(coded.name, [coded], list(coded.outputs))


def _float_branch(node: Node, scales: list[Value]) -> Graph:
    """The attention without a cache before it, and the codes of its keys and values."""
    name = f"{node.name}/float"
    inputs = [None if place in PAST else value for place, value in enumerate(node.inputs)]
    plain = Node(node.domain, ATTENTION, inputs, list(node.attributes.values()), num_outputs=3, name=name)
    step, zero = (constant(f"{name}/{array.dtype}", array) for array in (np.array(1, np.float32), np.array(0, np.int8)))
    nodes, outputs = [plain], [plain.outputs[0]]
    for part, value, scale in zip(("key", "value"), plain.outputs[1:], scales, strict=True):
        divided = onnx_ir.node("Div", [value, scale], name=f"{name}/{part}/scaled")
        # It rounds half to even and saturates, as the operator does.
        rounded = onnx_ir.node("QuantizeLinear", [divided.outputs[0], step, zero], name=f"{name}/{part}/codes")
        nodes += [divided, rounded]
        outputs.append(rounded.outputs[0])
    return _branch(name, nodes, outputs, [step, zero])


def _branch(name: str | None, nodes: list[Node], outputs: list[Value], constants: list[Value] | None = None) -> Graph:
    for node in nodes:
        for number, value in enumerate(node.outputs):
            value.name = f"{node.name}/value_{number}"  # in a branch, unlike any name outside
    for value, dtype in zip(outputs, (DataType.FLOAT, DataType.INT8, DataType.INT8), strict=True):
        value.type = TensorType(dtype)
    return Graph([], outputs, nodes=nodes, initializers=constants or [], name=name)


def _put(graph: Graph, old: Node, new: Node) -> None:
    """Put a node in the place of another one; its outputs take over names, types and uses."""
    graph.insert_before(old, new)
    for before, after in zip(old.outputs, new.outputs, strict=True):
        after.shape, after.type = before.shape, before.type
        after.name, before.name = before.name, f"{before.name}/before"
        onnx_ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def _operator(node: Node) -> Node | None:
    """The attention that a node is, or that it takes on a cache in codes; None for any other node."""
    if node.op_type == "If":
        branch = node.attributes["else_branch"].as_graph()
        node = branch[0] if len(branch) == 1 else node
    return node if node.op_type == ATTENTION else None


def _past(node: Node) -> list[Value]:
    return [value for value in (node.inputs[place] for place in PAST if len(node.inputs) > place) if value is not None]
