"""The CUDA provider, as far as a layer's numbers go: in which blocks its kernels take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qconvert.ir.layer_form import LayerForm
from qconvert.ir.scheme import PerGroup
from qconvert.targets.target import Target

if TYPE_CHECKING:
    from qconvert.ir.plan import LayerPlan

# Of MatMulNBits' CUDA kernels, those for few rows take blocks of 16 to 128, those for many rows, on weights that are packed
# when the model is loaded, only 32 (contrib_ops/cuda/quantization/matmul_4bits.cu and what the 1.31.1 wheel says of itself).
BLOCK = 32


def _block_size(plan: LayerPlan) -> int:
    """MatMulNBits' block for a layer: 32, over which larger groups repeat their scale; groups of 16 have kernels too."""
    group = plan.scheme.granularity.group_size if isinstance(plan.scheme.granularity, PerGroup) else BLOCK
    return min(group, BLOCK)


def _describe(plan: LayerPlan) -> str:
    """Say in a few words what a layer becomes on CUDA."""
    if plan.form is LayerForm.CONVOLUTION:
        return "Conv, its weight dequantized when the model is loaded (small on disk, not fast)"
    if plan.form is LayerForm.INT8_EMBEDDING:
        return "rows gathered as int8 and scaled"
    op = "GatherBlockQuantized" if plan.form.is_embedding else "MatMulNBits"
    copied = ", a padded copy of the weight" if CUDA.is_padded(plan) else ""
    float_activations = ", float activations" if plan.scheme.activations else ""
    return f"{op} of {plan.scheme.bits} bits in blocks of {CUDA.block_size(plan)}{copied}{float_activations}"


CUDA = Target(
    "cuda",
    provider="CUDAExecutionProvider",
    device="cuda",
    package="onnxruntime-gpu>=1.31",  # whose kernels graph/cuda_kernels.json has
    variant="cuda",
    half_precision=True,
    takes_zero_points=False,
    takes_static=False,
    takes_codebooks=False,
    block_size=_block_size,
    describe=_describe,
    provider_options=({"cuda": {}},),
)
