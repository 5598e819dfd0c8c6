"""Graphs for the CUDA provider, on the CPU provider of these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir
from onnx import TensorProto, helper

from qconvert.ort.session import file_session

CUDA_GRAPH = "model.cuda.onnx"


def graph_of(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / CUDA_GRAPH, load_external_data=False).graph


def session_of(folder: Path) -> Any:
    """The graph as it is, but for MultiHeadAttention, which the CPU provider has in float32 alone: casts go around it."""
    model = onnx.load(folder / CUDA_GRAPH, load_external_data=False)
    nodes = []
    for node in model.graph.node:
        if node.op_type != "MultiHeadAttention":
            nodes.append(node)
            continue
        wide = onnx.NodeProto()
        wide.CopyFrom(node)
        for index in range(3):
            wide.input[index] = f"{node.name}/{index}"
            nodes.append(helper.make_node("Cast", [node.input[index]], [wide.input[index]], to=TensorProto.FLOAT))
        wide.output[0] = f"{node.name}/wide"
        nodes += [wide, helper.make_node("Cast", [wide.output[0]], [node.output[0]], to=TensorProto.FLOAT16)]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    (folder / "model.cpu16.onnx").write_bytes(model.SerializeToString())
    return file_session(folder / "model.cpu16.onnx")


def widened_session(folder: Path) -> Any:
    """The graph with float32 in the place of bfloat16, for which the CPU provider has no kernels; the weights stay rounded."""
    model = onnx_ir.load(folder / CUDA_GRAPH)
    graph = model.graph
    for value in [*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)]:
        if value.dtype == onnx_ir.DataType.BFLOAT16:
            value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    for name, value in list(graph.initializers.items()):
        assert value.const_value is not None
        if value.dtype == onnx_ir.DataType.BFLOAT16:
            tensor = onnx_ir.tensor(value.const_value.numpy().astype("float32"), name=name)
            value.const_value, value.type = tensor, onnx_ir.TensorType(tensor.dtype)
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == onnx_ir.DataType.BFLOAT16:
            node.attributes["to"] = onnx_ir.AttrInt64("to", onnx_ir.DataType.FLOAT)
    onnx_ir.save(model, folder / "model.wide.onnx")
    return file_session(folder / "model.wide.onnx")
