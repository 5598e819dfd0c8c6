"""From one traced block of each kind to the graph of the whole model.

A block in the traced graph lies between its BlockInput and BlockOutput markers. What it gives, and what depends on that
input, on the block's own parameters and layers or on its own cache, is cloned for every block of the kind; the rest
(positions, masks) is shared. Two things lie beside that chain:

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
from qconvert.ir.model import stack_of
from qconvert.ir.template import DOMAIN
from qconvert.trace.cleanup import replace

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
    traced = list(bodies.values())
    first, last = traced[0], traced[-1]
    hidden = first.start.inputs[0] if first.start else None
    handed: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for number, (block, kind) in enumerate(blocks.items()):
        values = bodies[kind].clone(graph, block, hidden, handed, last.end, inputs, outputs)
        hidden = values[bodies[kind].result] if first.start else None
        if number == 0:
            handed = values
    if last.end is not None:
        assert hidden is not None
        old = last.end.outputs[0]
        outputs[:] = [hidden if value is old else value for value in outputs]
        replace(old, hidden)


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
        self.block, self.index = block, block.rpartition(".")[2]
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

    def clone(
        self,
        graph: onnx_ir.Graph,
        block: str,
        hidden: onnx_ir.Value | None,
        handed: Mapping[onnx_ir.Value, onnx_ir.Value],
        before: onnx_ir.Node | None,
        inputs: list[onnx_ir.Value],
        outputs: list[onnx_ir.Value],
    ) -> dict[onnx_ir.Value, onnx_ir.Value]:
        """Insert this body's nodes as those of `block`; returns what each of its values has become.

        hidden: what it is fed with. handed: of the stack's first block, what each value has become. before: where the
        nodes go, None for the end. Cache inputs and outputs of the block are appended to `inputs` and `outputs`.
        """
        index = block.rpartition(".")[2]
        values = dict(handed)
        if self.start is not None:
            assert hidden is not None
            values[self.start.outputs[0]] = hidden
        for value in self.caches:
            # The block's own is kept: what is shared may read the length of the past off it.
            values[value] = value if block == self.block else _copy(value, _cache_name(value, self.index, index))
            inputs.append(values[value])
        for value in self.parameters:
            assert value.name is not None
            values[value] = _copy(value, block + value.name[len(self.block) :])
            self.cloned.append(values[value])
        clones = []
        for position, node in enumerate(self.nodes):
            new_outputs = [
                _copy(value, _cache_name(value, self.index, index) if _in_cache(value) else f"{block}/{value.name}")
                for value in node.outputs
            ]
            values.update(zip(node.outputs, new_outputs, strict=True))
            attributes = dict(node.attributes)
            module = _attribute(node, "module")
            if module is not None:
                attributes["module"] = onnx_ir.AttrString("module", block + module[len(self.block) :])
            clones.append(
                onnx_ir.Node(
                    node.domain,
                    node.op_type,
                    [values.get(value, value) if value is not None else None for value in node.inputs],
                    list(attributes.values()),
                    outputs=new_outputs,
                    version=node.version,
                    name=f"{block}/{node.op_type}_{position}",
                )
            )
            outputs.extend(values[value] for value in node.outputs if value.is_graph_output() and _in_cache(value))
        if before is None:
            graph.extend(clones)
        else:
            graph.insert_before(before, clones)
        return values


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
