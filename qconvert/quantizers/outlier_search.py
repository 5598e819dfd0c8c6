"""Outlier search: how many input columns to keep in float beside an int8 matrix.

The largest column of a row sets the row's step, and all other columns are rounded to it. Without the k columns of the
largest magnitude, sampled rows x become x^ with the relative squared error

    e(k) = sum ||x - x^||^2 / sum ||x||^2

and the k with the least e(k) + PRICE * (k + PASS where k > 0) is taken: every column costs space, and any at all costs the
kernel another pass over inputs and outputs. The error is that of the rows and not of one linear's output, so that
linears that share an input find the same columns and go on sharing its quantized rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.ir.layer import CalibrationStats
from qconvert.ir.quantized import Outliers, QuantizedTensor
from qconvert.plugin.observer import AbsMax, SampledRows
from qconvert.quantizers.row_quantization import quantized_rows

PRICE = 5e-6  # of a column; what int8 weights lose to rounding is about 1e-4
PASS = 4  # the price of having any columns, in columns


def columns_that_pay(stats: CalibrationStats, limit: int) -> Tensor:
    """Return the columns [n] int64 to keep, sorted; n <= limit. stats: with AbsMax and SampledRows."""
    rows, largest = stats.values[SampledRows.name], by_magnitude(stats)[:limit]
    energy = float(rows.square().sum())
    if not energy:
        return largest[:0]

    def cost(count: int) -> float:
        error = float((quantized_rows(rows, largest[:count], stats.made_by) - rows).square_().sum())
        return error / energy + PRICE * (count + PASS if count else 0)

    return largest[: min(_ladder(len(largest)), key=cost)].sort().values


def by_magnitude(stats: CalibrationStats) -> Tensor:
    """Return all columns, the largest first; of equals the first."""
    return stats.values[AbsMax.name].argsort(descending=True, stable=True)


def with_outliers(tensor: QuantizedTensor, weight: Tensor, columns: Tensor) -> QuantizedTensor:
    """Return `tensor` with `columns` of weight [out, in] beside it, rounded to float16 unless one is beyond that."""
    if not len(columns):
        return tensor
    kept = weight[:, columns]
    half = kept.half().float()
    exact_enough = bool(torch.isfinite(half).all())
    return QuantizedTensor(
        tensor.q,
        tensor.scale,
        tensor.zero_point,
        tensor.scheme,
        outliers=Outliers(columns, half if exact_enough else kept),
    )


def _ladder(limit: int) -> list[int]:
    """The numbers of columns that are tried: 0, 1, 2, 4, ... limit."""
    return [0, *(2**power for power in range(limit.bit_length()) if 2**power < limit), limit]
