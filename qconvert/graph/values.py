"""Values of graphs: constants, and inputs by their names."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from onnx_ir import Graph, TensorType, Value


def constant(name: str, array: np.ndarray[Any, Any] | np.generic) -> Value:
    """Return a value that holds an array, for the initializers of a graph."""
    tensor = onnx_ir.tensor(array, name=name)
    return Value(name=name, shape=onnx_ir.Shape(array.shape), type=TensorType(tensor.dtype), const_value=tensor)


def added_constant(graph: Graph, name: str, array: np.ndarray[Any, Any] | np.generic) -> Value:
    """Return a new initializer of a graph, which holds an array."""
    value = constant(name, array)
    graph.register_initializer(value)
    return value


def giving(value: Value, name: str) -> Graph:
    """Return a branch of that name that does nothing but give a constant."""
    return Graph([], [value], nodes=[], initializers=[value], name=name)


def input_named(graph: Graph, name: str) -> Value:
    """Return the input of a graph with that name, which it has."""
    return next(value for value in graph.inputs if value.name == name)
