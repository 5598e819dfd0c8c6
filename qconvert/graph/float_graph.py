"""A template with every opaque node made a plain float op: the baseline that artifacts are compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

import onnx_ir
from onnx_ir import DataType, Value

from qconvert.graph.pieces import FLOAT32_BYTES
from qconvert.ir.template import DOMAIN, module_of

# A linear layer with more float32 weights than this is multiplied in the way that holds them once.
LARGE_BYTES = 2_000_000_000


def float_graph(template: onnx_ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> onnx_ir.Model:
    """Return a copy of the template's graph in plain float32 ops.

    shapes: of every parameter of the model. Weights are initializers without data under their parameter names, to be
    fed by ort.session.memory_session.
    """
    model = template.clone()
    for node in list(model.graph):
        if node.domain == DOMAIN:
            nodes, output = lower_float(model.graph, node, shapes)
            substitute(model.graph, node, nodes, output)
    number_repeated_names(model.graph)
    return model


def parameter(graph: onnx_ir.Graph, name: str, shape: tuple[int, ...]) -> Value:
    """Return the float32 initializer without data called `name`, which is made if it is not there yet."""
    if name not in graph.initializers:
        tensor = onnx_ir.LazyTensor(_no_data, dtype=DataType.FLOAT, shape=onnx_ir.Shape(shape), name=name)
        value = Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(DataType.FLOAT), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _no_data() -> onnx_ir.TensorProtocol:
    raise AssertionError("the data of a parameter is fed to the session")


def lower_float(
    graph: onnx_ir.Graph, node: onnx_ir.Node, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[onnx_ir.Node], Value]:
    """Return the float nodes that compute what the opaque `node` stands for, and their output."""
    x = node.inputs[0]
    assert x is not None
    name = module_of(node)
    weight = parameter(graph, f"{name}.weight", shapes[f"{name}.weight"])
    bias = parameter(graph, f"{name}.bias", shapes[f"{name}.bias"]) if f"{name}.bias" in shapes else None
    if node.op_type == "Embedding":
        gather = onnx_ir.node("Gather", [weight, x], name=f"{name}/Gather")
        return [gather], gather.outputs[0]
    if node.op_type == "Conv":
        attributes = {key: value for key, value in node.attributes.items() if key != "module"}
        conv = onnx_ir.Node("", "Conv", [x, weight, *([bias] if bias else [])], list(attributes.values()), name=f"{name}/Conv")
        return [conv], conv.outputs[0]
    is_linear = node.attributes["kind"].as_string() == "linear"
    if is_linear and FLOAT32_BYTES * prod(shapes[f"{name}.weight"]) > LARGE_BYTES and x.shape is not None and len(x.shape) == 3:
        nodes = _large_product(x, weight, name)
    else:
        nodes = []
        if is_linear:
            transpose = onnx_ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{name}/Transpose")
            nodes.append(transpose)
            weight = transpose.outputs[0]
        nodes.append(onnx_ir.node("MatMul", [x, weight], name=f"{name}/MatMul"))
    if bias is not None:
        nodes.append(onnx_ir.node("Add", [nodes[-1].outputs[0], bias], name=f"{name}/Add"))
    return nodes, nodes[-1].outputs[0]


def _large_product(x: Value, weight: Value, name: str) -> list[onnx_ir.Node]:
    """Nodes that give x @ weight^T as (weight @ x^T)^T, for x [rows, tokens, in] and a weight [out, in].

    A session copies what a MatMul has on its right, transposed and once more in the order of its kernel. What it has on its
    left stays as it is. The head of a model with 70 billion weights is 4.2 GB.
    """
    columns = onnx_ir.node("Transpose", [x], {"perm": [0, 2, 1]}, name=f"{name}/Columns")
    product = onnx_ir.node("MatMul", [weight, columns.outputs[0]], name=f"{name}/MatMul")
    return [columns, product, onnx_ir.node("Transpose", [product.outputs[0]], {"perm": [0, 2, 1]}, name=f"{name}/Rows")]


def substitute(graph: onnx_ir.Graph, node: onnx_ir.Node, nodes: list[onnx_ir.Node], output: Value) -> None:
    """Put `nodes` in the place of `node`; `output` takes over name, type and uses of its output."""
    old = node.outputs[0]
    graph.insert_before(node, nodes)
    output.name, old.name = old.name, f"{old.name}/opaque"
    output.shape, output.type = old.shape, old.type
    onnx_ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def replace(old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    """Let every user of `old`, the graph's outputs included, take `new`, which inherits a public output name."""
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}/replaced"
        new.shape, new.type = old.shape, old.type
    onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def look_up_narrow(graph: onnx_ir.Graph, table: Value, dtype: DataType) -> bool:
    """Let lookups read a table in the float type that it is stored in, and widen what they find.

    Returns False where something else reads the table too; the graph is then left as it is.
    """
    lookups = [node for node, place in table.uses() if node.op_type == "Gather" and place == 0]
    if not lookups or len(lookups) < len(table.uses()) or table.is_graph_output():
        return False
    table.type = onnx_ir.TensorType(dtype)
    for node in lookups:
        narrow = onnx_ir.node("Gather", list(node.inputs), dict(node.attributes), name=node.name)
        cast = onnx_ir.node("Cast", [narrow.outputs[0]], {"to": DataType.FLOAT}, name=f"{node.name}/Cast")
        substitute(graph, node, [narrow, cast], cast.outputs[0])
    return True


def number_repeated_names(graph: onnx_ir.Graph) -> None:
    """Give every node a name of its own, as ONNX wants it: what a layer's second call was lowered to is "NAME/2"."""
    count: Counter[str] = Counter()
    for node in graph:
        if node.name:
            count[node.name] += 1
            if count[node.name] > 1:
                node.name = f"{node.name}/{count[node.name]}"
