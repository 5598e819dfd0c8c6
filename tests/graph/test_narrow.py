"""Graphs in half the width: what becomes float16, what stays float32, and where the casts are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from calibrate_models import model_of
from onnx_ir import DataType
from torch import Tensor, nn

from qconvert.errors import UsageError
from qconvert.graph.float_graph import float_graph
from qconvert.graph.half_precision import narrow
from qconvert.trace import trace

HALF, FLOAT = DataType.FLOAT16, DataType.FLOAT


class Plain(nn.Module):
    """A function of inputs, as a module with one parameter."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.tensor([2.0, 0.5, -1.0, 3.0]))

    def forward(self, **inputs: Tensor) -> Any:
        return self.function(self.weight, **inputs)


class OfIds(Plain):
    def forward(self, ids: Tensor) -> Any:  # type: ignore[override]
        return self.function(self.weight, ids)


class OfX(Plain):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.function(self.weight, x)


X, IDS = torch.tensor([[1.0, -2.0, 0.25, 8.0]] * 2), torch.tensor([[3, 1, 0, 2049]] * 2)


def narrowed(plain: Plain, dtype: DataType = HALF) -> onnx_ir.Model:
    name, example = ("ids", IDS) if isinstance(plain, OfIds) else ("x", X)
    model = model_of(plain, example_inputs={name: example}, input_names=(name,))
    made = float_graph(trace(model).graphs["model"], model.parameter_shapes)
    narrow(made.graph, dtype)
    weight = made.graph.initializers["weight"]
    weight.const_value = onnx_ir.tensor(plain.weight.detach().numpy().astype(dtype.numpy()), name="weight")
    return made


def run(model: onnx_ir.Model, **inputs: Tensor) -> np.ndarray[Any, Any]:
    data = onnx_ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    return found


def types(model: onnx_ir.Model, op: str) -> set[DataType | None]:
    return {value.dtype for node in model.graph if node.op_type == op for value in (*node.inputs, *node.outputs) if value}


def test_activations_and_parameters_are_narrow_and_both_ends_of_the_graph_are_not() -> None:
    model = narrowed(OfX(lambda weight, x: (x * weight) + 1.5))
    assert types(model, "Mul") == types(model, "Add") == {HALF}
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {FLOAT}
    assert [value.name for value in model.graph.outputs] == ["output"]
    assert np.array_equal(run(model, x=X), (X * torch.tensor([2.0, 0.5, -1.0, 3.0]) + 1.5).numpy())


def test_what_is_computed_from_integers_stays_float32_until_it_meets_an_activation() -> None:
    model = narrowed(OfIds(lambda weight, ids: torch.sin(ids.float() * 0.5) * weight))
    assert types(model, "Sin") == {FLOAT}
    assert [node.op_type for node in model.graph if node.op_type == "Mul" and node.outputs[0].dtype == HALF] == ["Mul"]
    expected = torch.sin(IDS.float() * 0.5) * torch.tensor([2.0, 0.5, -1.0, 3.0])
    assert np.allclose(run(model, ids=IDS), expected.numpy(), rtol=2**-10)  # 2049 is no float16 number, its sine is right


def test_a_value_that_several_nodes_read_is_cast_once() -> None:
    model = narrowed(OfIds(lambda weight, ids: ids.float() * weight + ids.float() / weight))
    assert [node.op_type for node in model.graph].count("Cast") == 1 + 1 + 1  # to float32, to float16, the output


@pytest.mark.parametrize("dtype", [HALF, DataType.BFLOAT16])
def test_masks_are_filled_with_the_largest_number_of_the_type(dtype: DataType) -> None:
    """As float32 it would become infinite, and a row that is masked as a whole would be NaN."""
    lowest = torch.finfo(torch.float32).min
    model = narrowed(OfIds(lambda weight, ids: torch.softmax(torch.where(ids > 2, 0.0, lowest) + 0 * weight, -1)), dtype)
    constants = [value.const_value for value in model.graph.initializers.values() if value.uses()]
    fills = [float(constant.numpy().min()) for constant in constants if constant is not None]
    assert min(fills) == torch.finfo(getattr(torch, dtype.name.lower())).min


def test_a_guard_against_division_by_zero_stays_one() -> None:
    model = narrowed(OfX(lambda weight, x: x * weight / x.abs().clamp(min=1e-12)))  # which float16 would round to 0
    assert np.array_equal(run(model, x=torch.zeros(2, 4)), np.zeros((2, 4)))


def test_a_constant_array_beyond_the_type_is_refused() -> None:
    table = torch.tensor([1.0, 2.0, 3.0, 1e6])
    with pytest.raises(UsageError, match="holds 1e\\+06, but float16 ends at 65504") as caught:
        narrowed(OfX(lambda weight, x: x * weight + table))
    assert caught.value.code == "QC-CUDA-002"
    narrowed(OfX(lambda weight, x: x * weight + table), DataType.BFLOAT16)
