"""Stamping: one traced block of each kind becomes the graph of the whole model.

A block in the traced graph lies between its BlockInput and BlockOutput markers. The body of a block is every node that
depends on its BlockInput marker, parameters, layers or caches and is needed for its BlockOutput marker, its caches or a
later block. Bodies are cloned per block; the rest (positions, masks) is shared. Two things lie beside that chain:

1. The first block of a stack may hand on more than its hidden state (T5's position biases). The later ones read the
   clone of what they read in the trace, which must not depend on the hidden state.
2. A graph may hold some nodes of blocks whose hidden state it knows nothing of: in the graph of an encoder the keys and
   values that the decoder makes of the encoder's output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import groupby

import onnx_ir

from qconvert.errors import InputError
from qconvert.graph.float_graph import replace
from qconvert.ir.model import stack_of
from qconvert.ir.template import DOMAIN

CACHE_INPUTS, CACHE_OUTPUTS = ("past_key_values", "cross_key_values"), ("present", "cross_key_values")
MARKERS = ("BlockInput", "BlockOutput")


def stamp(graph: onnx_ir.Graph, representatives: Mapping[str, str]) -> None:
    """Turn `graph`, which holds the representatives only, into the graph of all blocks, in place.

    representatives: block -> traced block of its kind, in forward order.
    Raises InputError QC-EXPORT-002 where a block is not what can be cloned.
    """
    if set(representatives) != set(representatives.values()):
        inputs = [value for value in graph.inputs if not _in_cache(value)]
        outputs = [value for value in graph.outputs if not _in_cache(value)]
        bodies: dict[str, _Body] = {}
        for _, stack in groupby(representatives, stack_of):
            blocks = {block: representatives[block] for block in stack}
            mine = _bodies(graph, list(dict.fromkeys(blocks.values())))
            _stamp_stack(graph, blocks, mine, inputs, outputs)
            bodies |= mine
        graph.inputs[:] = inputs
        graph.outputs[:] = outputs
        graph.remove([node for body in bodies.values() for node in body.all_nodes], safe=False)
        for body in bodies.values():
            for value in body.parameters:
                del graph.initializers[value.name]  # type: ignore[arg-type]
        for body in bodies.values():
            for value in body.cloned:
                graph.register_initializer(value)


def _stamp_stack(
    graph: onnx_ir.Graph,
    blocks: Mapping[str, str],
    bodies: Mapping[str, _Body],
    inputs: list[onnx_ir.Value],
    outputs: list[onnx_ir.Value],
) -> None:
    """Clone the bodies of one stack for all of its blocks. blocks: block -> traced block."""
    cloner = _Cloner(graph, bodies, inputs, outputs)
    for block, kind in blocks.items():
        cloner.clone(bodies[kind], block)
    if cloner.before is not None:
        assert cloner.hidden is not None
        old = cloner.before.outputs[0]
        outputs[:] = [cloner.hidden if value is old else value for value in outputs]
        replace(old, cloner.hidden)


def _bodies(graph: onnx_ir.Graph, traced: list[str]) -> dict[str, _Body]:
    """The bodies of one stack. What depends on two blocks belongs to the later one, which was handed it."""
    bodies: dict[str, _Body] = {}
    taken: set[onnx_ir.Node] = set()
    for block in reversed(traced):
        bodies[block] = _Body(graph, block, taken, wanted={value for node in taken for value in node.inputs if value})
        taken.update(bodies[block].nodes)
    bodies = dict(reversed(bodies.items()))
    if len({body.start is None for body in bodies.values()}) > 1:
        raise _untraceable(traced[0], "takes or returns its hidden state in a way that can't be traced")
    read = {block: {value for node in body.nodes for value in node.inputs} for block, body in bodies.items()}
    for number, (block, body) in enumerate(bodies.items()):
        private = body.made if number else body.from_hidden
        if any(read[other] & private for other in bodies if other != block):
            raise _untraceable(block, "hands on more than its hidden state in a way that can't be traced")
    return bodies


def _untraceable(block: str, reason: str) -> InputError:
    return InputError(
        "QC-EXPORT-002", f"block {block} {reason}", hint="export it as a plain module with --model module:FACTORY"
    )


def _in_cache(value: onnx_ir.Value) -> bool:
    assert value.name is not None
    return value.name.startswith(tuple(f"{prefix}." for prefix in (*CACHE_INPUTS, *CACHE_OUTPUTS)))


def _cache_name(value: onnx_ir.Value, old_index: str, index: str) -> str:
    """The name of another block's cache: past_key_values.0.key -> past_key_values.7.key."""
    assert value.name is not None
    return value.name.replace(f".{old_index}.", f".{index}.", 1)


class _Body:
    """The nodes of one traced block.

    start, end: its markers; None where its hidden state is no part of the graph.
    made: all values that its nodes give; from_hidden: those that depend on the hidden state.
    """

    def __init__(
        self, graph: onnx_ir.Graph, block: str, taken: Collection[onnx_ir.Node], wanted: Collection[onnx_ir.Value]
    ) -> None:
        """taken: nodes of the blocks after this one; wanted: what they read."""
        self.block, self.index = block, _index(block)
        markers = {node.op_type: node for node in graph if node.domain == DOMAIN and _attribute(node, "block") == block}
        self.start, self.end = (markers.get(kind) for kind in MARKERS)
        if (self.start is None) != (self.end is None):
            raise _untraceable(block, "takes or returns its hidden state in a way that can't be traced")
        self.parameters = [value for name, value in graph.initializers.items() if name.startswith(block + ".")]
        caches = tuple(f"{prefix}.{self.index}." for prefix in CACHE_INPUTS)
        self.caches = [value for value in graph.inputs if str(value.name).startswith(caches)] if self.start else []
        entrance = [self.start.outputs[0]] if self.start else []
        own = [node for node in graph if (_attribute(node, "module") or "").startswith(block + ".")]
        dependent = _dependents(graph, [*self.parameters, *self.caches, *entrance], own)
        before = _ancestors(self.start.inputs) if self.start else set()
        given = [value for node in dependent for value in node.outputs if value.is_graph_output() and _in_cache(value)]
        needed = _ancestors([*given, *wanted, *(self.end.inputs if self.end else ())])
        self.nodes = [node for node in graph if node in dependent and node in needed and node not in {*taken, *before}]
        self.made = {value for node in self.nodes for value in node.outputs}
        self.from_hidden = {value for node in _dependents(graph, entrance, []) for value in node.outputs} & self.made
        self.cloned: list[onnx_ir.Value] = []

    @property
    def all_nodes(self) -> list[onnx_ir.Node]:
        return [node for node in (self.start, *self.nodes, self.end) if node is not None]

    @property
    def result(self) -> onnx_ir.Value:
        assert self.end is not None
        assert self.end.inputs[0] is not None
        return self.end.inputs[0]


class _Cloner:
    """Clones the bodies of one stack, block after block.

    inputs, outputs: those of the graph, to which the caches of every block are appended.
    hidden: the hidden state that the next block is fed with; None where it is no part of the graph.
    handed: what each value of the stack's first block has become. before: where the nodes go, None for the end.
    """

    def __init__(
        self, graph: onnx_ir.Graph, bodies: Mapping[str, _Body], inputs: list[onnx_ir.Value], outputs: list[onnx_ir.Value]
    ) -> None:
        traced = list(bodies.values())
        first, last = traced[0], traced[-1]
        self.graph, self.inputs, self.outputs = graph, inputs, outputs
        self.hidden = first.start.inputs[0] if first.start else None
        self.handed: dict[onnx_ir.Value, onnx_ir.Value] | None = None
        self.before = last.end

    def clone(self, body: _Body, block: str) -> None:
        """Insert the nodes of a body as those of `block`."""
        values = self._given(body, block)
        clones = [self._node(body, block, position, values) for position in range(len(body.nodes))]
        if self.before is None:
            self.graph.extend(clones)
        else:
            self.graph.insert_before(self.before, clones)
        if self.handed is None:
            self.handed = values
        self.hidden = values[body.result] if body.start else None

    def _given(self, body: _Body, block: str) -> dict[onnx_ir.Value, onnx_ir.Value]:
        """Return what stands for the values that the body's nodes read: hidden state, caches and parameters of the block."""
        values = dict(self.handed or {})
        if body.start is not None:
            assert self.hidden is not None
            values[body.start.outputs[0]] = self.hidden
        for value in body.caches:
            # The block's own is kept: what is shared may read the length of the past off it.
            own = block == body.block
            values[value] = value if own else _copy(value, _cache_name(value, body.index, _index(block)))
            self.inputs.append(values[value])
        for value in body.parameters:
            assert value.name is not None
            values[value] = _copy(value, block + value.name[len(body.block) :])
            body.cloned.append(values[value])
        return values

    def _node(self, body: _Body, block: str, position: int, values: dict[onnx_ir.Value, onnx_ir.Value]) -> onnx_ir.Node:
        """The clone of a node, whose outputs are put into `values`."""
        node = body.nodes[position]
        made = [
            _copy(value, _cache_name(value, body.index, _index(block)) if _in_cache(value) else f"{block}/{value.name}")
            for value in node.outputs
        ]
        values.update(zip(node.outputs, made, strict=True))
        attributes = dict(node.attributes)
        module = _attribute(node, "module")
        if module is not None:
            attributes["module"] = onnx_ir.AttrString("module", block + module[len(body.block) :])
        self.outputs.extend(values[value] for value in node.outputs if value.is_graph_output() and _in_cache(value))
        return onnx_ir.Node(
            node.domain,
            node.op_type,
            [values.get(value, value) if value is not None else None for value in node.inputs],
            list(attributes.values()),
            outputs=made,
            version=node.version,
            name=f"{block}/{node.op_type}_{position}",
        )


def _index(block: str) -> str:
    return block.rpartition(".")[2]


def _dependents(graph: onnx_ir.Graph, values: Iterable[onnx_ir.Value], nodes: Iterable[onnx_ir.Node]) -> set[onnx_ir.Node]:
    """`nodes`, and all that depends on them or on `values` without a block's border in between."""
    found, reached = set(nodes), set(values)
    for node in graph:
        border = node.domain == DOMAIN and node.op_type in MARKERS
        if not border and (node in found or any(value in reached for value in node.inputs)):
            found.add(node)
            reached.update(node.outputs)
    return found


def _ancestors(values: Iterable[onnx_ir.Value | None]) -> set[onnx_ir.Node]:
    """All nodes that `values` are computed by."""
    found: set[onnx_ir.Node] = set()
    waiting = [value.producer() for value in values if value is not None]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(value.producer() for value in node.inputs if value is not None)
    return found


def _attribute(node: onnx_ir.Node, name: str) -> str | None:
    attribute = node.attributes.get(name)
    return None if attribute is None else attribute.as_string()


def _copy(value: onnx_ir.Value, name: str) -> onnx_ir.Value:
    """A value of the same type and shape under another name; data-less parameters stay data-less."""
    const = value.const_value
    if const is not None:
        assert isinstance(const, onnx_ir.LazyTensor)
        const = onnx_ir.LazyTensor(const._evaluate, dtype=const.dtype, shape=const.shape, name=name)
    return onnx_ir.Value(name=name, shape=value.shape, type=value.type, const_value=const)
