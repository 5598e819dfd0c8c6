"""The CPU provider: its facts, and in which blocks its kernels take scales. Nothing heavy is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qconvert.ir.number_format import GROUP_SIZES
from qconvert.ir.scheme import PerGroup
from qconvert.targets.target import Target

if TYPE_CHECKING:
    from qconvert.ir.plan import LayerPlan


def _block_size(plan: LayerPlan) -> int:
    """MatMulNBits' block: the group, else the largest kernel block that divides the width, else the smallest."""
    if isinstance(plan.scheme.granularity, PerGroup):
        return plan.scheme.granularity.group_size
    return next((size for size in reversed(GROUP_SIZES) if plan.in_features % size == 0), GROUP_SIZES[0])


CPU = Target(
    "cpu",
    provider="CPUExecutionProvider",
    device="cpu",
    package="onnxruntime>=1.28",  # docs/processors.md has what was seen of older ones
    variant="",
    half_precision=False,
    takes_zero_points=True,
    block_size=_block_size,
    describe=None,
    provider_options=(),
    takes_static=True,
    takes_codebooks=True,
    takes_cache_codes=True,
)
