"""Building blocks of lowered graphs: initializers that point into the artifact's files, and small constants."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnx_ir import DataType, Node, Value

from qconvert.ir.artifact import StoredTensor

ONNX_TYPES = {
    torch.float32: DataType.FLOAT,
    torch.float16: DataType.FLOAT16,
    torch.bfloat16: DataType.BFLOAT16,
    torch.float64: DataType.DOUBLE,
    torch.float8_e4m3fn: DataType.FLOAT8E4M3FN,
    torch.float8_e5m2: DataType.FLOAT8E5M2,
    torch.int64: DataType.INT64,
    torch.int32: DataType.INT32,
    torch.int8: DataType.INT8,
    torch.uint8: DataType.UINT8,
    torch.bool: DataType.BOOL,
}


class GraphBuilder:
    """Adds nodes and initializers to the graph that is being lowered.

    stored: tensor -> its place in the artifact's files; grows with what is written into the sidecar.
    nodes: what was added for the opaque node at hand, in order.
    """

    def __init__(self, graph: onnx_ir.Graph, stored: dict[str, StoredTensor]) -> None:
        self.graph = graph
        self.stored = stored
        self.nodes: list[Node] = []
        self._widened: dict[Value, Value] = {}

    def take_nodes(self) -> list[Node]:
        """Return the nodes that were added since the last call, in order, and begin a new list."""
        nodes, self.nodes = self.nodes, []
        return nodes

    def op(self, op_type: str, inputs: Sequence[Value | None], name: str, domain: str = "", **attributes: Any) -> Value:
        """Add a node and give its first output."""
        node = onnx_ir.node(op_type, list(inputs), attributes, domain=domain, name=name)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> Value:
        """Return a small initializer kept in the graph itself; the same name gives the same value."""
        if name not in self.graph.initializers:
            tensor = onnx_ir.tensor(array, name=name)
            self._register(name, tensor, tensor.dtype, array.shape)
        return self.graph.initializers[name]

    def repeated(self, value: np.generic, count: int) -> Value:
        """Return a vector of `count` times `value`: DequantizeLinear wants as many zero points as scales."""
        return self.constant(f"qconvert/{value.dtype}_{value}_times_{count}", np.full(count, value))

    def external(self, name: str, shape: Sequence[int] | None = None, dtype: DataType | None = None, view: str = "") -> Value:
        """Return the stored tensor `name` as an initializer, optionally under another shape or type of the same bytes.

        view: what tells this initializer from another one on the same bytes.
        """
        stored = self.stored[name]
        name += view
        if name not in self.graph.initializers:
            onnx_type = dtype or ONNX_TYPES[stored.dtype]
            onnx_shape = tuple(stored.shape if shape is None else shape)
            tensor = onnx_ir.ExternalTensor(
                stored.file, stored.offset, stored.nbytes, onnx_type, shape=onnx_ir.Shape(onnx_shape), name=name
            )
            self._register(name, tensor, onnx_type, onnx_shape)
        return self.graph.initializers[name]

    def view(self, initializer: Value, dtype: DataType, name: str, shape: Sequence[int] | None = None) -> Value:
        """Return another initializer on the bytes of an external one, of another type, optionally under another shape; the same
        name gives the same value.
        """
        if name not in self.graph.initializers:
            stored = initializer.const_value
            assert isinstance(stored, onnx_ir.ExternalTensor)
            dims = stored.shape.numpy() if shape is None else tuple(shape)
            tensor = onnx_ir.ExternalTensor(
                stored.location, stored.offset, stored.length, dtype, shape=onnx_ir.Shape(dims), name=name
            )
            self._register(name, tensor, dtype, dims)
        return self.graph.initializers[name]

    def spanning(self, values: Sequence[Value], axis: int) -> Value:
        """Join initializers along `axis`: without a copy where they lie one behind the other in a file, else by a Concat, which
        folds when the model is loaded.
        """
        tensors = [value.const_value for value in values]
        name = ",".join(str(value.name) for value in values)
        external = [tensor for tensor in tensors if isinstance(tensor, onnx_ir.ExternalTensor)]
        if axis != 0 or len(external) < len(tensors) or not _adjacent(external):
            return self.op("Concat", values, f"{name}/Concat", axis=axis)
        if name not in self.graph.initializers:
            first = external[0]
            shape = (sum(tensor.shape.numpy()[0] for tensor in external), *first.shape.numpy()[1:])
            tensor = onnx_ir.ExternalTensor(
                first.location,
                first.offset,
                sum(tensor.length or 0 for tensor in external),
                first.dtype,
                shape=onnx_ir.Shape(shape),
                name=name,
            )
            self._register(name, tensor, first.dtype, shape)
        return self.graph.initializers[name]

    def float32(self, value: Value) -> Value:
        """Return `value`, cast if it is not float32; casts of initializers fold when the model is loaded."""
        if value.dtype == DataType.FLOAT:
            return value
        return self.op("Cast", [value], f"{value.name}/Cast", to=DataType.FLOAT)

    def widened(self, value: Value) -> Value:
        """Return `value` as float32, cast once for all its users: for nodes that go to the front of the graph."""
        if value not in self._widened:
            self._widened[value] = self.float32(value)
        return self._widened[value]

    def _register(self, name: str, tensor: Any, dtype: DataType, shape: Sequence[int]) -> None:
        value = Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(dtype), const_value=tensor)
        self.graph.register_initializer(value)


def _adjacent(tensors: Sequence[onnx_ir.ExternalTensor]) -> bool:
    """Return whether the tensors of one type lie one behind the other in one file."""
    return all(
        after.location == before.location
        and after.dtype == before.dtype
        and after.offset == (before.offset or 0) + (before.length or 0)
        for before, after in pairwise(tensors)
    )
