"""targets/cpu_sidecar.py: ONNX Runtime's kernels compute with our bytes what dequantize says."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.layer import LayerKind
from qconvert.ir.number_format import GROUP_SIZES
from qconvert.ir.plan import LayerPlan
from qconvert.ir.quantized import Outliers, QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.quantizer import round_to_nearest
from qconvert.storage import compressed_tensors
from qconvert.storage.digest import tensor_bytes
from qconvert.targets.cpu import CPU
from qconvert.targets.cpu_sidecar import sidecar_tensors

OUT = 6


def quantized(width: int, scheme: str, kind: LayerKind = "linear", out: int = OUT) -> tuple[LayerPlan, QuantizedTensor]:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(width)) + 0.3
    parsed = QuantScheme.parse(scheme)
    return LayerPlan("layer", kind, out, width, parsed), round_to_nearest(weight, parsed)


def matmul_nbits(plan: LayerPlan, tensor: QuantizedTensor) -> Tensor:
    """The matrix [out, in] that MatMulNBits multiplies with: its output for an identity matrix."""
    disk, sidecar = compressed_tensors.encode(plan, tensor), sidecar_tensors(plan, tensor)
    size, bits = CPU.block_size(plan), plan.scheme.bits
    packed = sidecar["kernel_weight"] if CPU.is_padded(plan) else disk["weight_packed"]
    shape = (plan.out_features, -(-plan.in_features // size), size * bits // 8)
    inputs = {
        "w": np.frombuffer(bytes(tensor_bytes(packed)), np.uint8).reshape(shape),
        "s": sidecar.get("kernel_scale", disk["weight_scale"]).float().numpy(),
    }
    if tensor.zero_point is not None:
        inputs["z"] = sidecar["kernel_zero_point"].numpy()
    node = helper.make_node(
        "MatMulNBits",
        ["x", *inputs],
        ["y"],
        domain="com.microsoft",
        K=plan.in_features,
        N=plan.out_features,
        bits=bits,
        block_size=size,
        accuracy_level=1,  # float activations: the product is exact
    )
    graph = helper.make_graph(
        [node],
        "kernel",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, plan.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, plan.out_features])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in inputs.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"x": np.eye(plan.in_features, dtype=np.float32)})
    return torch.from_numpy(output.T.copy())


GROUPED = [
    (f"int{bits}-g{group}{asym}", group * blocks)
    for bits, group, asym, blocks in product((4, 8), GROUP_SIZES, ("", "-asym"), (1, 3))
]
# 64: one block; 96, 160: several; 768: three, so that a row of packed 4-bit zero points ends in half a byte;
# 20, 33, 5: no block divides them, so the codes are padded, 5 and 33 to an odd number of nibbles on disk.
SHARED = [
    (f"int{bits}-{granularity}{asym}", width)
    for bits, granularity, asym, width in product((4, 8), ("tensor", "channel"), ("", "-asym"), (64, 96, 160, 768, 20, 33, 5))
]


@pytest.mark.parametrize(("scheme", "width"), GROUPED + SHARED)
def test_matmul_nbits_multiplies_with_the_dequantized_weight(scheme: str, width: int) -> None:
    plan, tensor = quantized(width, scheme)
    assert torch.allclose(matmul_nbits(plan, tensor), tensor.dequantize(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", ["int4-channel", "int8-tensor", "int4-g32-asym"])
def test_a_layer_of_one_output(scheme: str) -> None:
    plan, tensor = quantized(64, scheme, out=1)
    assert torch.allclose(matmul_nbits(plan, tensor), tensor.dequantize(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "width", "size", "padded"),
    [
        ("int4-g32", 256, 32, False),
        ("int4-channel", 2048, 256, False),
        ("int4-channel", 576, 64, False),
        ("int8-tensor", 48, 16, False),
        ("int8-channel", 40, 16, True),
        ("int4-channel", 5, 16, True),
    ],
)
def test_the_block_is_the_group_or_the_largest_that_divides(scheme: str, width: int, size: int, padded: bool) -> None:
    plan, _ = quantized(width, scheme)
    assert (CPU.block_size(plan), CPU.is_padded(plan)) == (size, padded)


@pytest.mark.parametrize(
    ("scheme", "width", "expected"),
    [
        ("int4-g32", 96, {}),  # everything is shared with model.safetensors
        ("int8-channel", 256, {}),
        ("int8-channel", 512, {"kernel_scale": (torch.float32, (OUT, 2))}),
        ("int4-tensor", 256, {"kernel_scale": (torch.float16, (OUT, 1))}),
        ("int4-g32-asym", 96, {"kernel_zero_point": (torch.uint8, (OUT, 2))}),
        ("int8-g32-asym", 96, {"kernel_zero_point": (torch.uint8, (OUT, 3))}),
        (
            "int4-channel-asym",
            40,
            {
                "kernel_weight": (torch.uint8, (OUT, 3, 8)),
                "kernel_scale": (torch.float16, (OUT, 3)),
                "kernel_zero_point": (torch.uint8, (OUT, 2)),
            },
        ),
        ("int8-channel-a8", 40, {}),  # its kernel reads the int-quantized tensors as they are
        ("int8-tensor-asym-a8", 40, {}),
    ],
)
def test_the_sidecar_holds_only_what_the_shared_bytes_do_not(
    scheme: str, width: int, expected: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    extra = sidecar_tensors(*quantized(width, scheme))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in extra.items()} == expected


@pytest.mark.parametrize(("scheme", "bits"), [("int4-g16-asym", 4), ("int8-channel-asym", 8), ("int8-tensor-asym", 8)])
def test_convolutions_get_unpacked_unsigned_zero_points(scheme: str, bits: int) -> None:
    plan, tensor = quantized(32, scheme, "conv2d")
    assert tensor.zero_point is not None
    extra = sidecar_tensors(plan, tensor)
    assert extra.keys() == {"kernel_zero_point"}
    assert extra["kernel_zero_point"].dtype == torch.uint8
    assert torch.equal(extra["kernel_zero_point"].int(), tensor.zero_point.int().expand(OUT, -1) + 2 ** (bits - 1))


def with_outliers(columns: list[int], dtype: torch.dtype) -> tuple[LayerPlan, QuantizedTensor]:
    plan, tensor = quantized(32, "int8-channel-a8")
    weight = torch.randn(OUT, len(columns), generator=torch.Generator().manual_seed(1)).to(dtype).float()
    return plan, QuantizedTensor(tensor.q, tensor.scale, None, tensor.scheme, outliers=Outliers(torch.tensor(columns), weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_int8_product_without_the_outliers_plus_their_float_product_is_the_whole(dtype: torch.dtype) -> None:
    plan, tensor = with_outliers([3, 17], dtype)
    extra = sidecar_tensors(plan, tensor)
    assert extra["outlier_weight"].dtype == dtype  # in half the space only where that loses nothing
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    codes = tensor.q.float() * tensor.scale
    product = (x * extra["outlier_mask"]) @ codes.T + x[:, extra["outlier_columns"]] @ extra["outlier_weight"].float()
    assert torch.allclose(product, x @ tensor.dequantize().T, atol=1e-5)


def test_what_could_not_be_folded_is_a_factor_of_the_input() -> None:
    plan, tensor = quantized(32, "int8-channel")
    scale = torch.linspace(0.5, 2, 32)
    scaled = QuantizedTensor(tensor.q, tensor.scale, None, tensor.scheme, smoothing_scale=scale)
    factor = sidecar_tensors(plan, scaled)["input_factor"]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    assert torch.allclose((x * factor) @ tensor.dequantize().T, x @ scaled.dequantize().T, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int4-g16", "int8-g16", "int4-g16-asym"])
def test_scales_are_stored_without_loss_whatever_their_size(scheme: str) -> None:
    for size, dtype in ((1.0, torch.float16), (1e-8, torch.float32), (1e8, torch.float32)):
        parsed = QuantScheme.parse(scheme)
        scale = round_to_nearest(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) * size, parsed).scale
        stored = affine.stored_scale(scale, parsed)
        assert stored.dtype == dtype
        assert torch.equal(stored.float(), scale)
