"""The kernels that ONNX Runtime's CUDA provider has, as data, and the check that a graph is made for them.

cuda_kernels.json holds the kernels of one version of ONNX Runtime and says where it has them from. A kernel that serves an
operator from some version on does not serve that operator's later versions, so the table is made for one opset.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir
from onnx_ir import DataType, Node, Value

from qconvert.errors import UsageError

TABLE = Path(__file__).with_name("cuda_kernels.json")


TYPES = frozenset(kind.name.lower() for kind in DataType)
INTEGERS = frozenset(
    kind
    for kind in DataType
    if kind.name in ("BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "INT4", "UINT4")
)
# Inputs that say how long or where something is, beyond those that are int64 by their schema (Reshape's shape, ...).
LENGTHS = frozenset(
    {("Slice", 1), ("Slice", 2), ("Slice", 3), ("Slice", 4), ("GroupQueryAttention", 5), ("GroupQueryAttention", 6)}
)


@dataclass(frozen=True, slots=True)
class Operator:
    """An op for which the provider has kernels.

    inputs, outputs: per parameter a type ("int64") or the type parameter ("T") that has to be one of `types`. The last
        parameter stands for all further ones.
    types: the combinations that there are kernels for, type parameter -> types.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: tuple[Mapping[str, tuple[str, ...]], ...]

    @staticmethod
    def parameter(parameters: tuple[str, ...], index: int) -> str:
        """Return the name of parameter `index`; the last one stands for all that follow it, as in a variadic op."""
        return parameters[min(index, len(parameters) - 1)]


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


@cache
def _operators() -> dict[tuple[str, str], Operator]:
    return {
        (entry["domain"], entry["op"]): Operator(tuple(entry["inputs"]), tuple(entry["outputs"]), tuple(entry["types"]))
        for entry in _table()["operators"]
    }


def version() -> str:
    """Return the version of ONNX Runtime that the table was taken from."""
    return str(_table()["onnxruntime"])


def operator(node: Node) -> Operator | None:
    """Return the table's entry for the op of `node`, None where there is no kernel of it."""
    return _operators().get((node.domain, node.op_type))


def check_kernels(graph: onnx_ir.Graph) -> None:
    """Check that every node has a CUDA kernel for its types, but for those whose place does not matter.

    That are nodes whose inputs are all constants (they are computed when the model is loaded), and nodes on integers alone
    from which only shapes and sequence lengths are made: those may run on the CPU.

    Raises UsageError QC-CUDA-001, which names every other node without a kernel.
    """
    folded = set(graph.initializers.values()) - set(graph.inputs)
    missing = []
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if inputs and folded.issuperset(inputs):
            folded.update(node.outputs)
        elif not has_kernel(node) and not only_lengths(node):
            missing.append(f"{node.name} ({node.op_type} of {', '.join(map(_type, inputs))})")
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UsageError(
            "QC-CUDA-001",
            f"ONNX Runtime {version()} has no CUDA kernel for {'; '.join(missing[:3])}{more}",
            hint="leave out --target cuda, or change what the model computes there",
        )


def has_kernel(node: Node) -> bool:
    """Return whether some kernel takes the types of all inputs and outputs of `node`."""
    found = operator(node)
    if found is None:
        return False
    bound: dict[str, set[str]] = {}
    for parameter, value in bindings(found, node):
        bound.setdefault(parameter, set()).add(_type(value))
    if any(types != {parameter} if parameter in TYPES else len(types) > 1 for parameter, types in bound.items()):
        return False
    return any(all(types <= set(row.get(parameter, types)) for parameter, types in bound.items()) for row in found.types)


def bindings(found: Operator, node: Node) -> Iterator[tuple[str, Value]]:
    """Yield (parameter of the op, value) for every input and output that is there."""
    for parameters, values in ((found.inputs, node.inputs), (found.outputs, node.outputs)):
        for index, value in enumerate(values):
            if value is not None:
                yield Operator.parameter(parameters, index), value


def _type(value: Value) -> str:
    return value.dtype.name.lower() if value.dtype is not None else "unknown"


def only_lengths(node: Node) -> bool:
    """Return whether a node computes with integers alone, and only for shapes and sequence lengths."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    return all(value.dtype in INTEGERS for value in values) and all(map(_feeds_lengths, node.outputs))


def _feeds_lengths(value: Value) -> bool:
    uses = [(use.node, use.idx) for use in value.uses()]
    return not value.is_graph_output() and all(_is_length(node, index) or only_lengths(node) for node, index in uses)


def _is_length(node: Node, index: int) -> bool:
    found = operator(node)
    return (node.op_type, index) in LENGTHS or (
        found is not None and index > 0 and Operator.parameter(found.inputs, index) == "int64"
    )
