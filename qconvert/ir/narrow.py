"""A float32 graph in half the width: float16 or bfloat16, with casts where float32 has to stay.

1. Parameters, activations and caches take the narrow type.
2. What is computed from integers alone stays float32 until it meets an activation: rotary angles of positions beyond 2048
   are no float16 numbers.
3. Inputs and outputs stay float32, but for the caches, which nobody looks into: one program runs both graphs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
import torch
from onnx_ir import DataType, Node, TensorType, Value

from qconvert.ir.cuda import Operator, bindings, operator

FLOAT32_MAX = float(np.finfo(np.float32).max)


class _Narrowing:
    def __init__(self, graph: onnx_ir.Graph, dtype: DataType) -> None:
        self.graph, self.dtype = graph, dtype
        info = torch.finfo(getattr(torch, dtype.name.lower()))
        self.limit, self.smallest = info.max, info.smallest_normal * info.eps
        self._casts: dict[Value, Value] = {}

    def value(self, value: Value) -> Value:
        """`value` in the narrow type: a constant as another constant, anything else behind a Cast."""
        if value not in self._casts:
            self._casts[value] = self._constant(value) if _is_constant(value) else self._cast(value)
        return self._casts[value]

    def _cast(self, value: Value) -> Value:
        node = onnx_ir.node("Cast", [value], {"to": self.dtype}, name=f"{value.name}/{self.dtype.name.lower()}")
        cast = node.outputs[0]
        cast.name, cast.shape, cast.type = node.name, value.shape, TensorType(self.dtype)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return cast

    def _constant(self, value: Value) -> Value:
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.size == 1:
            array = self._in_range(array)
        tensor = onnx_ir.tensor(array.astype(self.dtype.numpy()), name=f"{value.name}/{self.dtype.name.lower()}")
        narrow = Value(name=tensor.name, shape=tensor.shape, type=TensorType(self.dtype), const_value=tensor)
        self.graph.register_initializer(narrow)
        return narrow

    def _in_range(self, array: np.ndarray) -> np.ndarray:
        """A number that would become infinite, or zero and no longer keep a division from it, stays as far as it can."""
        magnitude = np.abs(array)
        nearest = np.clip(magnitude, self.smallest, self.limit)
        return np.where((magnitude > 0) & np.isfinite(array), np.copysign(nearest, array), array)

    def fill_values(self, node: Node) -> None:
        """The largest float32, with which masks are filled, becomes the largest of the type, in float32 parts as well."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == DataType.FLOAT and _is_constant(value):
                assert value.const_value is not None
                if value.const_value.size == 1 and abs(float(value.const_value.numpy().item())) == FLOAT32_MAX:
                    tensor = onnx_ir.tensor(np.copysign(np.float32(self.limit), value.const_value.numpy()), name=f"{value.name}/fill")
                    if tensor.name not in self.graph.initializers:
                        self.graph.register_initializer(
                            Value(name=tensor.name, shape=tensor.shape, type=TensorType(DataType.FLOAT), const_value=tensor)
                        )
                    node.replace_input_with(index, self.graph.initializers[tensor.name])


def narrow(graph: onnx_ir.Graph, dtype: DataType) -> None:
    """Give every float32 value of `graph` that depends on an input or a parameter the type `dtype`, in place.

    graph: sorted; parameters are initializers without data (ir/template.py), which change their type alone. Types of values
    that have none yet are filled in. Constants get a variant under another name, "NAME/float16".
    """
    work = _Narrowing(graph, dtype)
    caches = _caches(graph)
    for value in graph.inputs:
        if value.dtype == DataType.FLOAT:
            if value in caches:
                value.type = TensorType(dtype)
            else:
                uses = list(value.uses())
                cast = work.value(value)
                for node, index in uses:
                    node.replace_input_with(index, cast)
    for value in graph.initializers.values():
        if isinstance(value.const_value, onnx_ir.LazyTensor):
            value.type = TensorType(dtype)
            value.const_value = onnx_ir.LazyTensor(
                value.const_value._evaluate, dtype=dtype, shape=value.const_value.shape, name=value.name
            )
    for node in list(graph):
        _narrow_node(node, work)
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype == dtype and value not in caches:
            _widen_output(graph, index, value)


def _narrow_node(node: Node, work: _Narrowing) -> None:
    work.fill_values(node)
    found = operator(node)
    floats = [
        index
        for index, value in enumerate(node.inputs)
        if value is not None
        and value.dtype in (DataType.FLOAT, work.dtype)
        and (found is None or Operator.parameter(found.inputs, index) != "float")
    ]
    if any(node.inputs[index].dtype == work.dtype for index in floats):  # type: ignore[union-attr]
        for index in floats:
            value = node.inputs[index]
            assert value is not None
            if value.dtype == DataType.FLOAT:
                node.replace_input_with(index, work.value(value))
    _type_outputs(node, found, work.dtype)


def _type_outputs(node: Node, found: Operator | None, dtype: DataType) -> None:
    """The outputs' types, as they follow from those of the inputs; what can't be known stays what it is."""
    if node.op_type == "Cast":
        node.outputs[0].type = TensorType(DataType(node.attributes["to"].as_int()))
        return
    if found is None:
        return
    known = {parameter: value.type for parameter, value in bindings(found, node) if value.producer() is not node}
    for index, output in enumerate(node.outputs):
        parameter = Operator.parameter(found.outputs, index)
        if parameter in known:
            output.type = known[parameter]


def _caches(graph: onnx_ir.Graph) -> set[Value]:
    """The keys and values of earlier tokens, as the attention op takes and gives them."""
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    taken = {value for node in attention for value in node.inputs[3:5] if value is not None}
    return taken | {value for node in attention for value in node.outputs[1:3]}


def _widen_output(graph: onnx_ir.Graph, index: int, value: Value) -> None:
    name = value.name
    value.name = f"{name}/{value.dtype.name.lower() if value.dtype else ''}"
    cast = onnx_ir.node("Cast", [value], {"to": DataType.FLOAT}, name=f"{name}/Float")
    output = cast.outputs[0]
    output.name, output.shape, output.type = name, value.shape, TensorType(DataType.FLOAT)
    graph.append(cast)
    graph.outputs[index] = output


def _is_constant(value: Value) -> bool:
    """Whether the graph itself holds the value."""
    return isinstance(value.const_value, onnx_ir.Tensor | onnx_ir.TensorProtocol) and not isinstance(
        value.const_value, onnx_ir.LazyTensor | onnx_ir.ExternalTensor
    )
