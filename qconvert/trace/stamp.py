"""From one traced block of each kind to the graph of the whole model.

A block in the traced graph lies between its BlockInput and BlockOutput markers. Whatever depends on that input, on the
block's own parameters or on its own cache is cloned for every block of the kind; the rest (positions, masks) is shared.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir

from qconvert.errors import InputError
from qconvert.ir.template import DOMAIN
from qconvert.trace.cleanup import replace

CACHE_INPUT, CACHE_OUTPUT = "past_key_values", "present"


def stamp(graph: onnx_ir.Graph, representatives: Mapping[str, str]) -> None:
    """Turn `graph`, which holds the representatives only, into the graph of all blocks, in place.

    representatives: block -> traced block of its kind, in forward order.
    """
    traced = list(dict.fromkeys(representatives.values()))
    if list(representatives) != traced:
        bodies = {block: _Body(graph, block) for block in traced}
        last = bodies[traced[-1]].end
        hidden = bodies[traced[0]].start.inputs[0]
        assert hidden is not None
        inputs = [value for value in graph.inputs if not _in_cache(value)]
        outputs = [value for value in graph.outputs if not _in_cache(value)]
        for block, kind in representatives.items():
            hidden = bodies[kind].clone(graph, block, hidden, before=last, inputs=inputs, outputs=outputs)
        replace(last.outputs[0], hidden)
        outputs = [hidden if value is last.outputs[0] else value for value in outputs]
        graph.inputs[:] = inputs
        graph.outputs[:] = outputs
        graph.remove([node for body in bodies.values() for node in body.all_nodes], safe=False)
        for body in bodies.values():
            for value in body.parameters:
                del graph.initializers[value.name]  # type: ignore[arg-type]
        for block_parameters in bodies[traced[0]].cloned, *(bodies[kind].cloned for kind in traced[1:]):
            for value in block_parameters:
                graph.register_initializer(value)


def _in_cache(value: onnx_ir.Value) -> bool:
    assert value.name is not None
    return value.name.startswith((CACHE_INPUT + ".", CACHE_OUTPUT + "."))


def _cache_name(value: onnx_ir.Value, old_index: str, index: str) -> str:
    """The name of another block's cache: past_key_values.0.key -> past_key_values.7.key."""
    assert value.name is not None
    return value.name.replace(f".{old_index}.", f".{index}.", 1)


class _Body:
    """The nodes of one traced block."""

    def __init__(self, graph: onnx_ir.Graph, block: str) -> None:
        self.block = block
        markers = {node.op_type: node for node in graph if node.domain == DOMAIN and _attribute(node, "block") == block}
        if set(markers) != {"BlockInput", "BlockOutput"}:
            raise InputError(
                "QC-EXPORT-002",
                f"block {block} takes or returns its hidden state in a way that can't be traced",
                hint="export it as a plain module with --model module:FACTORY",
            )
        self.start, self.end = markers["BlockInput"], markers["BlockOutput"]
        self.parameters = [value for name, value in graph.initializers.items() if name.startswith(block + ".")]
        cache = f"{CACHE_INPUT}.{block.rpartition('.')[2]}."
        own = {value for value in graph.inputs if value.name is not None and value.name.startswith(cache)}
        own |= set(self.parameters) | {self.start.outputs[0]}
        self.nodes: list[onnx_ir.Node] = []
        for node in graph:
            if node is not self.end and node is not self.start and any(value in own for value in node.inputs):
                self.nodes.append(node)
                own.update(node.outputs)
        self.cloned: list[onnx_ir.Value] = []

    @property
    def all_nodes(self) -> list[onnx_ir.Node]:
        return [self.start, *self.nodes, self.end]

    def clone(
        self,
        graph: onnx_ir.Graph,
        block: str,
        hidden: onnx_ir.Value,
        before: onnx_ir.Node,
        inputs: list[onnx_ir.Value],
        outputs: list[onnx_ir.Value],
    ) -> onnx_ir.Value:
        """Insert this body's nodes as those of `block`, fed by `hidden`; returns its hidden output.

        Cache inputs and outputs of the block are appended to `inputs` and `outputs`.
        """
        old_index, index = self.block.rpartition(".")[2], block.rpartition(".")[2]
        values: dict[onnx_ir.Value, onnx_ir.Value] = {self.start.outputs[0]: hidden}
        for value in graph.inputs:
            if value.name is not None and value.name.startswith(f"{CACHE_INPUT}.{old_index}."):
                values[value] = _copy(value, _cache_name(value, old_index, index))
                inputs.append(values[value])
        for value in self.parameters:
            assert value.name is not None
            values[value] = _copy(value, block + value.name[len(self.block) :])
            self.cloned.append(values[value])
        clones = []
        for position, node in enumerate(self.nodes):
            new_outputs = [
                _copy(value, _cache_name(value, old_index, index) if _in_cache(value) else f"{block}/{value.name}")
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
        graph.insert_before(before, clones)
        result = self.end.inputs[0]
        assert result is not None
        return values[result]


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
