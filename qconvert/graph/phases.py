"""Decoders with two bodies in one graph: one for prompts, one for the tokens that follow, over the same weights.

    If(Shape(input_ids)[1] > MOST_DECODED): the body for prompts
    else:                                   the body for decoding

Both read weights, inputs and caches of the graph around them. What is computed from constants alone stands there too, so that
it is folded once when a session is created.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import onnx_ir
from onnx_ir import Graph, Node, Value
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qconvert.graph.values import added_constant, input_named
from qconvert.ir.artifact import INPUT_KEY

Phase = Literal["prompt", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)
BRANCHES: dict[Phase, str] = {"prompt": "then_branch", "decode": "else_branch"}

CHOICE = "qconvert/phase"
# As many new tokens of a row are still decoded: with int8 rows, a few tokens take as long as with MatMulNBits, or longer.
MOST_DECODED = 8


def phases_of(graph: Graph) -> tuple[Phase, ...]:
    """Return the phases that a graph has bodies for; () where it has one body for all."""
    return () if _choice(graph) is None else PHASES


def bodies_of(graph: Graph) -> list[Graph]:
    """Return the bodies that a graph has inside; [] where it is the only one."""
    choice = _choice(graph)
    return [] if choice is None else [choice.attributes[BRANCHES[phase]].as_graph() for phase in PHASES]


def branch_off(graph: Graph) -> dict[Phase, Graph]:
    """Move what depends on the inputs of `graph` into a body for decoding, and return that with a copy of it for prompts.

    `graph` keeps its inputs, its initializers, and the nodes that depend on constants alone; it has no outputs until
    `choose_by_length` gives it some.
    """
    varying = set(graph.inputs)
    body = []
    for node in graph:
        if not varying.isdisjoint(_reads(node)):
            varying.update(node.outputs)
            body.append(node)
    outputs = list(graph.outputs)
    graph.outputs.clear()
    graph.remove(body)
    decode = Graph([], outputs, nodes=body, name="decode")
    bodies: dict[Phase, Graph] = {"prompt": decode.clone(allow_outer_scope_values=True), "decode": decode}
    bodies["prompt"].name = "prompt"
    return bodies


def choose_by_length(graph: Graph, bodies: dict[Phase, Graph]) -> None:
    """Let `graph` run one of `bodies`, which `branch_off` made of it, by the number of new tokens in a row, in place."""
    for value in bodies["decode"].outputs:  # names in a branch are unlike any outside
        graph.outputs.append(Value(name=value.name, shape=value.shape, type=value.type))
        value.name = f"decode/{value.name}"
    _rename(bodies["prompt"])
    length = onnx_ir.node("Shape", [input_named(graph, "input_ids")], {"start": 1, "end": 2}, name=f"{CHOICE}/length")
    limit = added_constant(graph, f"{CHOICE}/most_decoded", np.array([MOST_DECODED], np.int64))
    is_prompt = onnx_ir.node("Greater", [length.outputs[0], limit], name=f"{CHOICE}/is_prompt")
    branches = [onnx_ir.AttrGraph(BRANCHES[phase], bodies[phase]) for phase in PHASES]
    choice = Node("", "If", is_prompt.outputs, branches, outputs=list(graph.outputs), name=CHOICE)
    graph.extend([length, is_prompt, choice])


def phase_of(model: onnx_ir.Model, phase: Phase) -> onnx_ir.Model:
    """Return `model` with the body of one phase for any number of tokens. What only the other one needs is taken out."""
    graph, choice = model.graph, _choice(model.graph)
    assert choice is not None, "the graph has one body for all"
    outputs = list(graph.outputs)
    graph.outputs.clear()
    bodies = {each: choice.attributes[BRANCHES[each]].as_graph() for each in PHASES}
    graph.remove(choice)
    for other in PHASES:
        if other != phase:
            _detach(bodies[other])
    body = bodies[phase]
    found = list(body.outputs)
    body.outputs.clear()
    nodes = list(body)
    body.remove(nodes)
    graph.extend(nodes)
    for value, output in zip(found, outputs, strict=True):
        value.name, output.name = output.name, f"{output.name}/chosen"
        value.shape, value.type = value.shape or output.shape, output.type
        graph.outputs.append(value)
    choice.replace_input_with(0, None)
    RemoveUnusedNodesPass()(model)
    return model


def _choice(graph: Graph) -> Node | None:
    return next((node for node in graph if node.name == CHOICE), None)


def _reads(node: Node) -> list[Value]:
    """The values that a node reads, those of its branches included."""
    inner = [value for branch in _branches(node) for each in branch.all_nodes() for value in each.inputs]
    return [value for value in (*node.inputs, *inner) if value is not None]


def _branches(node: Node) -> list[Graph]:
    return [attribute.as_graph() for attribute in node.attributes.values() if attribute.type == onnx_ir.AttributeType.GRAPH]


def _rename(body: Graph) -> None:
    """Give the values of the body for prompts names of their own."""
    names = {str(value.name): f"prompt/{value.name}" for node in body.all_nodes() for value in node.outputs}
    for node in body.all_nodes():
        for value in node.outputs:
            if value.name:
                value.name = names[value.name]
        for branch in _branches(node):
            for initializer in list(branch.initializers.values()):
                initializer.name = f"prompt/{initializer.name}"
        if INPUT_KEY in node.metadata_props:
            name = node.metadata_props[INPUT_KEY]
            node.metadata_props[INPUT_KEY] = names.get(name, name)


def _detach(body: Graph) -> None:
    """Let the nodes of a body that is not taken read nothing, so that nothing is kept for them."""
    for node in body.all_nodes():
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
