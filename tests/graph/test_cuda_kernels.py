"""The table of CUDA kernels, and which graphs pass it."""

from __future__ import annotations

import json
from typing import Any

import cuda_registry
import numpy as np
import onnx_ir
import onnxruntime
import pytest
from onnx_ir import DataType, Node, TensorType, Value

from qconvert.errors import UsageError
from qconvert.graph import cuda_kernels
from qconvert.ort.session import why_unavailable
from qconvert.trace.capture import OPSET

HALF, FLOAT, INT64, INT32, UINT8 = DataType.FLOAT16, DataType.FLOAT, DataType.INT64, DataType.INT32, DataType.UINT8


def value(name: str, dtype: DataType) -> Value:
    return Value(name=name, type=TensorType(dtype), shape=onnx_ir.Shape([1]))


def node(op: str, inputs: list[Value], out: DataType, domain: str = "", **attributes: Any) -> Node:
    made = onnx_ir.node(op, inputs, attributes, domain=domain, name=f"the {op}")
    made.outputs[0].name, made.outputs[0].type = f"{op}/out", TensorType(out)
    return made


def graph(inputs: list[Value], nodes: list[Node], constants: list[Value] = ()) -> onnx_ir.Graph:  # type: ignore[assignment]
    made = onnx_ir.Graph(inputs, [nodes[-1].outputs[0]], nodes=nodes, opset_imports={"": OPSET})
    for constant in constants:
        constant.const_value = onnx_ir.tensor(np.zeros(1, np.uint8), name=constant.name)
        made.register_initializer(constant)
    return made


def refusal(made: onnx_ir.Graph) -> UsageError:
    with pytest.raises(UsageError) as caught:
        cuda_kernels.check_kernels(made)
    assert caught.value.code == "QC-CUDA-001"
    assert "leave out --target cuda" in caught.value.hint
    return caught.value


# --- the table ---


def test_the_table_is_of_the_opset_that_is_traced_and_of_the_installed_onnx_runtime() -> None:
    table = json.loads(cuda_kernels.TABLE.read_text())
    assert (table["opset"], table["onnxruntime"]) == (OPSET, onnxruntime.__version__)
    assert table["source"]


@pytest.mark.skipif(cuda_registry.PROVIDER not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu")
def test_the_table_is_what_this_onnx_runtime_registers() -> None:
    assert why_unavailable("cuda") is None
    assert json.loads(cuda_kernels.TABLE.read_text())["operators"] == cuda_registry.operators(cuda_registry.registered())


@pytest.mark.parametrize(
    ("first", "last", "served"), [(22, 2**31 - 1, True), (7, 2**31 - 1, False), (7, 22, True), (7, 21, False)]
)
def test_a_kernel_without_an_end_serves_the_version_it_was_written_for_alone(first: int, last: int, served: bool) -> None:
    """Cosine is in its version of opset 22: ONNX Runtime runs it on the CPU where the kernel is of opset 7 and open-ended."""
    kernel = ("", "Cos", (first, last), {"T": ["tensor(float16)"]})
    listed = [entry["op"] for entry in cuda_registry.operators([kernel])]
    assert listed == (["Cos"] if served else [])


def test_merged_rows_say_the_same() -> None:
    rows = [{"T": [a], "U": [b]} for a in ("float", "float16") for b in ("int32", "int64")] + [
        {"T": ["double"], "U": ["int32"]}
    ]
    merged = cuda_registry._merged([dict(row) for row in rows])
    assert sorted((t, u) for row in merged for t in row["T"] for u in row["U"]) == sorted(
        (row["T"][0], row["U"][0]) for row in rows
    )
    assert len(merged) == 2


# --- graphs ---


def test_nodes_with_kernels_pass() -> None:
    x = value("x", HALF)
    add = node("Add", [x, x], HALF)
    cuda_kernels.check_kernels(graph([x], [add, node("Cast", [add.outputs[0]], FLOAT, to=FLOAT)]))


def test_an_op_without_a_kernel_is_named_with_its_types() -> None:
    x = value("x", HALF)
    error = refusal(graph([x], [node("Celu", [x], HALF)]))
    assert f"ONNX Runtime {onnxruntime.__version__} has no CUDA kernel for the Celu (Celu of float16)" in error.message


def test_float32_that_meets_float16_has_no_kernel() -> None:
    x, y = value("x", HALF), value("y", FLOAT)
    assert "the Mul (Mul of float16, float)" in refusal(graph([x, y], [node("Mul", [x, y], HALF)])).message


def test_attention_has_no_kernel_for_float32_and_none_for_a_cache_of_another_type() -> None:
    def attention(activations: DataType, cache: DataType) -> onnx_ir.Graph:
        q, past, lengths = value("q", activations), value("past", cache), value("lengths", INT32)
        inputs = [q, q, q, past, past, lengths, lengths]
        return graph([q, past, lengths], [node("GroupQueryAttention", inputs, activations, "com.microsoft")])

    cuda_kernels.check_kernels(attention(HALF, HALF))
    refusal(attention(FLOAT, FLOAT))
    refusal(attention(HALF, DataType.BFLOAT16))


def test_what_is_computed_from_constants_needs_no_kernel() -> None:
    """ONNX Runtime folds it when the model is loaded, on the CPU."""
    codes = value("codes", UINT8)
    flip = node("BitwiseXor", [codes, codes], UINT8)
    cuda_kernels.check_kernels(graph([], [flip, node("Cast", [flip.outputs[0]], HALF, to=HALF)], [codes]))
    given = value("given", UINT8)
    refusal(graph([given], [node("BitwiseXor", [given, given], UINT8)]))


def test_integers_that_become_a_shape_may_stay_on_the_cpu() -> None:
    x, size = value("x", HALF), value("size", INT64)
    odd = node("BitwiseXor", [size, size], INT64)  # no CUDA kernel
    cuda_kernels.check_kernels(graph([x, size], [odd, node("Reshape", [x, odd.outputs[0]], HALF)]))


def test_integers_that_become_a_sequence_length_may_stay_on_the_cpu() -> None:
    q, total = value("q", HALF), value("total", INT32)
    odd = node("BitwiseXor", [total, total], INT32)
    attention = node("GroupQueryAttention", [q, q, q, q, q, total, odd.outputs[0]], HALF, "com.microsoft")
    cuda_kernels.check_kernels(graph([q, total], [odd, attention]))


def test_integers_that_are_computed_with_may_not() -> None:
    ids, table = value("ids", INT64), value("table", HALF)
    odd = node("BitwiseXor", [ids, ids], INT64)
    assert "BitwiseXor" in refusal(graph([ids, table], [odd, node("Gather", [table, odd.outputs[0]], HALF)])).message


def test_a_result_may_not() -> None:
    ids = value("ids", INT64)
    refusal(graph([ids], [node("BitwiseXor", [ids, ids], INT64)]))


def test_three_nodes_are_named_and_the_others_counted() -> None:
    x = value("x", HALF)
    message = refusal(graph([x], [node("Celu", [x], HALF) for _ in range(5)])).message
    assert message.count("Celu of") == 3
    assert message.endswith("and 2 more")
