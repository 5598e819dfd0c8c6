"""The rows that a linear reads as int8 kernels see them: codes with one step per row."""

from __future__ import annotations

from torch import Tensor

from qconvert.ir import activations


def quantized_rows(rows: Tensor, columns: Tensor | None = None, made_by: str | None = None) -> Tensor:
    """Return `rows` [n, in] as the kernels see them; outlier `columns` neither count for the step nor are they rounded.

    made_by: see CalibrationStats. A row may have been multiplied by its importance, so that no step is too small for it.
    """
    kept = rows if columns is None else rows.index_fill(1, columns, 0)
    step = activations.row_codes(made_by)._replace(least_step=0.0).step_of(kept)
    rounded = (kept / step).round_().nan_to_num_(0) * step  # a row of zeros has no step
    return rounded if columns is None else rounded.index_copy_(1, columns, rows[:, columns])
