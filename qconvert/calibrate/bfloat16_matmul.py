"""Matrix products of calibration: in bfloat16 where the processor multiplies that faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def coarse_products() -> Iterator[None]:
    """Let float32 matrix products on the CPU round their factors to bfloat16 within the context; sums stay in float32.

    Calibration samples stand for all other texts, from which they differ far more than by the relative 2^-9 of that rounding,
    and a statistic is a mean over thousands of rows, where it averages out. A processor with AMX takes half the time or less;
    one without takes no more than before, whether oneDNN rounds there (AVX512) or not (AVX2).
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
