"""A float32 graph in half the width: float16 or bfloat16, with casts where float32 has to stay.

1. Parameters, activations and caches take the narrow type.
2. What is computed from integers alone stays float32 until it meets an activation: rotary angles of positions beyond 2048
   are no float16 numbers.
3. Inputs and outputs stay float32, but for the caches, which nobody looks into: one program runs both graphs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from onnx_ir import DataType, Node, TensorType, Value

from qconvert.errors import UsageError
from qconvert.graph.cuda_kernels import TYPES, Operator, bindings, operator
from qconvert.ir.graph_names import is_cache

WIDER = "set cuda_dtype: bfloat16 in the recipe, which has the range of float32"
FLOAT32_MAX = float(np.finfo(np.float32).max)


def out_of_range(name: str, largest: float, dtype: str, limit: float) -> UsageError:
    """Return the error QC-CUDA-002 for a tensor with a number that becomes infinite.

    dtype: "float16", as users write it. limit: its largest number.
    """
    return UsageError(
        "QC-CUDA-002",
        f"tensor {name} holds {largest:.6g}, but {dtype} ends at {limit:.6g}",
        hint=f"{WIDER}, or leave out --target cuda",
    )


class _Narrowing:
    """The values of one graph in the narrow type, each made once."""

    def __init__(self, graph: onnx_ir.Graph, dtype: DataType) -> None:
        self.graph, self.dtype = graph, dtype
        self.type_name = dtype.name.lower()
        self.limit, self.smallest = float(dtype.max), float(dtype.tiny) * float(dtype.eps)
        self._made: dict[Value, Value] = {}

    def value(self, value: Value) -> Value:
        """`value` in the narrow type: a constant as another constant, anything else behind a Cast."""
        if value not in self._made:
            self._made[value] = self._constant(value) if _is_constant(value) else self._cast(value)
        return self._made[value]

    def _cast(self, value: Value) -> Value:
        node = onnx_ir.node("Cast", [value], {"to": self.dtype}, name=f"{value.name}/{self.type_name}")
        cast = node.outputs[0]
        cast.name, cast.shape, cast.type = node.name, value.shape, TensorType(self.dtype)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return cast

    def _constant(self, value: Value) -> Value:
        array = _array(value)
        if array.size == 1:
            array = self._within_range(array)
        array = np.where(np.abs(array) == FLOAT32_MAX, np.copysign(np.float32(self.limit), array), array)
        with np.errstate(over="ignore"):  # refused below
            narrow_array = array.astype(self.dtype.numpy())
        beyond = np.isfinite(array) & ~np.isfinite(narrow_array)
        if beyond.any():
            raise out_of_range(str(value.name), float(np.abs(array[beyond]).max()), self.type_name, self.limit)
        return self._register(f"{value.name}/{self.type_name}", narrow_array, self.dtype)

    def _within_range(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A number that would become infinite, or zero and then keep no division from it, goes as far as it can."""
        nearest = np.clip(np.abs(array), self.smallest, self.limit)
        return np.where((array != 0) & np.isfinite(array), np.copysign(nearest, array), array)

    def fill_value(self, value: Value) -> Value | None:
        """Instead of the largest float32, with which masks are filled, the largest number of the type, as float32.

        In a part that stays float32 it would become infinite when that part is cast.
        """
        if value.dtype != DataType.FLOAT or not _is_constant(value) or _array(value).size != 1:
            return None
        array = _array(value)
        if np.abs(array).item() != FLOAT32_MAX:
            return None
        return self._register(f"{value.name}/fill", np.copysign(np.float32(self.limit), array), DataType.FLOAT)

    def _register(self, name: str, array: np.ndarray[Any, Any], dtype: DataType) -> Value:
        if name not in self.graph.initializers:
            tensor = onnx_ir.tensor(array, name=name)
            value = Value(name=name, shape=onnx_ir.Shape(array.shape), type=TensorType(dtype), const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


def narrow(graph: onnx_ir.Graph, dtype: DataType) -> None:
    """Give every float32 value of `graph` that depends on an input or a parameter the type `dtype`, in place.

    graph: sorted; parameters are initializers without data (ir/template.py), which change their type alone. Types of values
    that have none yet are filled in. Constants get a variant under another name, "NAME/float16".
    Raises UsageError QC-CUDA-002 for a constant with a number that `dtype` can't hold.
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
    for index, value in enumerate(node.inputs):
        fill = None if value is None else work.fill_value(value)
        if fill is not None:
            node.replace_input_with(index, fill)
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
        elif parameter in TYPES:
            output.type = TensorType(DataType[parameter.upper()])


def _caches(graph: onnx_ir.Graph) -> set[Value]:
    """The keys and values that go out of one run and into the next."""
    return {value for value in (*graph.inputs, *graph.outputs) if is_cache(str(value.name))}


def _widen_output(graph: onnx_ir.Graph, index: int, value: Value) -> None:
    name = value.name
    value.name = f"{name}/{value.dtype.name.lower() if value.dtype else ''}"
    cast = onnx_ir.node("Cast", [value], {"to": DataType.FLOAT}, name=f"{name}/Float")
    output = cast.outputs[0]
    output.name, output.shape, output.type = name, value.shape, TensorType(DataType.FLOAT)
    graph.append(cast)
    graph.outputs[index] = output


def _is_constant(value: Value) -> bool:
    """Return whether the graph itself holds the value."""
    return value.const_value is not None and not isinstance(value.const_value, onnx_ir.LazyTensor | onnx_ir.ExternalTensor)


def _array(value: Value) -> np.ndarray[Any, Any]:
    assert value.const_value is not None
    return value.const_value.numpy()
