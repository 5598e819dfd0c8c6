"""What int8 kernels make of the rows that a linear reads: one symmetric scale per row, its largest magnitude by ROW_STEPS."""

from __future__ import annotations

from torch import Tensor

from qconvert.ir import kernel


def quantized_rows(rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """`rows` [n, in] as the kernels see them; outlier `columns` neither count for the scale nor are they rounded."""
    kept = rows if columns is None else rows.index_fill(1, columns, 0)
    step = kept.abs().amax(1, keepdim=True) / kernel.ROW_STEPS
    rounded = (kept / step).round_().nan_to_num_(0) * step  # a row of zeros has no step
    return rounded if columns is None else rounded.index_copy_(1, columns, rows[:, columns])
