"""Worked numbers from published teaching material on quantization, through the built-in quantizers."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from qconvert.ir.layer import Layer
from qconvert.ir.plan import LayerPlan
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.quantizer import Quantizer
from qconvert.quantizers.absmax import AbsMaxQuantizer
from qconvert.quantizers.per_channel import PerChannelQuantizer
from qconvert.quantizers.zero_point import ZeroPointQuantizer


def quantized(quantizer: Quantizer, scheme: str, weight: Tensor) -> QuantizedTensor:
    return quantizer.quantize(Layer("layer", "linear", weight), QuantScheme.parse(scheme))


def absmax(values: Tensor) -> QuantizedTensor:
    return quantized(AbsMaxQuantizer(), "int8-tensor", torch.atleast_2d(values))


def zero_point(values: Tensor) -> QuantizedTensor:
    return quantized(ZeroPointQuantizer(), "int8-tensor-asym", torch.atleast_2d(values))


def mean_error(tensor: QuantizedTensor, values: Tensor) -> float:
    return round(float((tensor.dequantize() - values).abs().mean()), 4)


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor]:
    """W [3, 5] and x [5]: the first seeded draws of torch, the first number of each set to 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight, x = torch.randn(3, 5), torch.randn(5)
    weight[0, 0] = x[0] = 0
    return weight, x


class TestAbsmax:
    def test_one_value_below_the_largest(self) -> None:
        assert absmax(torch.tensor([0.1, -3.2])).q.tolist() == [[4, -127]]

    def test_four_values(self) -> None:
        tensor = absmax(torch.tensor([1.2371, 0.8954, -0.3421, 2.1095]))
        assert tensor.q.tolist() == [[74, 54, -21, 127]]
        assert round(tensor.scale.item(), 4) == 0.0166
        assert [round(value, 4) for value in tensor.dequantize()[0].tolist()] == [1.2292, 0.8970, -0.3488, 2.1095]

    def test_a_matrix_and_a_vector(self, drawn: tuple[Tensor, Tensor]) -> None:
        weight, x = drawn
        assert absmax(weight).q.tolist() == [[0, -17, -127, 33, -63], [-82, 24, 49, -42, -24], [-35, 11, -50, 64, -62]]
        assert absmax(x).q.tolist() == [[0, -48, 31, -75, -127]]
        assert (mean_error(absmax(weight), weight), mean_error(absmax(x), x)) == (0.0039, 0.0019)


class TestZeroPoint:
    def test_the_ends_of_the_range_and_a_value_between(self) -> None:
        tensor = zero_point(torch.tensor([-3.0, 0.1, 3.2]))
        assert round(1 / tensor.scale.item(), 2) == 41.13
        assert tensor.zero_point is not None
        assert tensor.zero_point.tolist() == [[-5]]
        assert tensor.q.tolist() == [[-128, -1, 127]]

    def test_a_matrix_with_the_integer_zero_point_that_runtimes_want(self, drawn: tuple[Tensor, Tensor]) -> None:
        weight, _ = drawn
        tensor = zero_point(weight)
        assert tensor.zero_point is not None
        assert tensor.zero_point.tolist() == [[41]]
        assert tensor.q.tolist() == [[41, 18, -128, 85, -43], [-68, 72, 106, -15, 10], [-5, 55, -26, 127, -42]]
        assert mean_error(tensor, weight) == 0.0034


class TestTheIntegerProduct:
    def test_it_needs_more_than_8_bits(self, drawn: tuple[Tensor, Tensor]) -> None:
        weight, x = absmax(drawn[0]), absmax(drawn[1])
        product = weight.q.int() @ x.q[0].int()
        assert product.tolist() == [2405, 6565, 996]
        assert product.to(torch.int8).tolist() == [101, -91, -28]
        dequantized = product * weight.scale[0] * x.scale[0]
        assert [round(value, 4) for value in dequantized.tolist()] == [0.4903, 1.3383, 0.2030]
        assert [round(value, 4) for value in (drawn[0] @ drawn[1]).tolist()] == [0.4829, 1.3345, 0.2121]

    def test_onnx_runtime_computes_it_from_our_codes(self, drawn: tuple[Tensor, Tensor]) -> None:
        weight, x = absmax(drawn[0]), absmax(drawn[1])
        graph = helper.make_graph(
            [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
            "product",
            [helper.make_tensor_value_info(name, TensorProto.INT8, None) for name in ("x", "w")],
            [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (product,) = session.run(None, {"x": x.q.numpy(), "w": np.ascontiguousarray(weight.q.T.numpy())})
        assert product.tolist() == [[2405, 6565, 996]]


class TestZeroAndConstants:
    @pytest.mark.parametrize("scheme", ["int8-tensor", "int8-channel", "int8-g16", "int4-channel", "int4-g16"])
    @pytest.mark.parametrize("value", [0.3, -0.3])
    def test_a_symmetric_scheme_keeps_zero_and_constant_groups(self, scheme: str, value: float) -> None:
        weight = torch.full((2, 32), value)
        tensor = quantized(AbsMaxQuantizer(), scheme, weight)
        # int8 at the end of its range, int4 at the signed maximum: exact up to the rounding of the stored scale.
        assert tensor.q.unique().tolist() == ([-8] if scheme.startswith("int4") else [round(127 * value / 0.3)])
        # int4: 8 significant bits, so that a loader's float16 product of code and scale is exact (test_affine).
        epsilon = 2**-8 if tensor.scheme.bits == 4 else 2**-11 if tensor.scheme.scale_dtype == torch.float16 else 2**-23
        assert torch.allclose(tensor.dequantize(), weight, rtol=epsilon, atol=0)
        weight[:, ::2] = 0
        assert quantized(AbsMaxQuantizer(), scheme, weight).q[:, ::2].unique().tolist() == [0]

    @pytest.mark.parametrize("scheme", ["int8-tensor-asym", "int8-channel-asym", "int8-g16-asym", "int4-g16-asym"])
    def test_an_asymmetric_scheme_maps_zero_to_its_zero_point_and_back_to_exactly_zero(self, scheme: str) -> None:
        weight = torch.linspace(-0.7, 1.9, 64).reshape(2, 32)
        weight[:, ::4] = 0
        tensor = quantized(ZeroPointQuantizer(), scheme, weight)
        assert tensor.zero_point is not None
        assert (tensor.zero_point != 0).any()
        groups = tensor.zero_point.expand(2, -1).repeat_interleave(32 // tensor.zero_point.shape[1], 1)
        assert torch.equal(tensor.q[:, ::4], groups[:, ::4])
        assert tensor.dequantize()[:, ::4].unique().tolist() == [0]


def test_the_codes_of_each_kind_of_scheme() -> None:
    assert absmax(torch.tensor([-1.0, 1.0])).q.tolist() == [[-127, 127]]
    assert zero_point(torch.tensor([-1.0, 2.0])).q.tolist() == [[-128, 127]]
    int4 = quantized(AbsMaxQuantizer(), "int4-channel", torch.tensor([[1.0, -1.0, 0.5]]))
    assert int4.q.tolist() == [[-8, 7, -4]]  # the scale is w[argmax |w|] / -8
    assert int4.scale.item() == -0.125


@pytest.mark.parametrize(
    ("scheme", "nbytes"),
    [
        ("int8-channel-a8", 512 * 768 + 512 * 4),
        ("int8-channel", 512 * 768 + 512 * 4 + 16),  # packed layers say their shape: two int64
        ("int4-g32", 512 * 768 // 2 + 512 * 24 * 2 + 16),
        ("int4-g32-asym", 512 * 768 // 2 + 512 * 24 * 2 + 512 * 24 // 2 + 16),
    ],
)
def test_a_linear_takes_its_codes_scales_and_zero_points(scheme: str, nbytes: int) -> None:
    assert LayerPlan("layer", "linear", 512, 768, QuantScheme.parse(scheme)).nbytes == nbytes


def test_an_mlp_of_361_kb_becomes_95_kb() -> None:
    """784-100-100-10, on disk with some framing around the tensors; int8 per channel, biases in float."""
    widths = [784, 100, 100, 10]
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    assert sum(out * (width + 1) for out, width in shapes) * 4 == 358_440
    layers = [LayerPlan("layer", "linear", *shape, PerChannelQuantizer.default_scheme) for shape in shapes]
    assert sum(layer.nbytes + layer.out_features * 4 for layer in layers) == 91_080
