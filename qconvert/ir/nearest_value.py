"""Weights to codes of a codebook, and back: weight [..., group] ~ values[q] * scale, as bitsandbytes does it bit for bit.

Source: bitsandbytes 0.50, `quantize_4bit` and `dequantize_4bit` on the CPU, whose operations on float32 these are.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qconvert.ir.codebook import Codebook

# A magnitude below it is divided by this in its stead, since float32 has no reciprocal of it.
SMALLEST = 1e-38


def codes_of(groups: Tensor, scale: Tensor, codebook: Codebook) -> Tensor:
    """Return the codes [..., group] int8 of weights in float32. scale: [...], the largest magnitude of each group.

    A weight in the very middle of two numbers gets the lower one. A group of zeros gets the code of 0.
    """
    ascending, middles = _middles(codebook)
    shares = (groups * (1.0 / scale.clamp(min=SMALLEST)).unsqueeze(-1)).clamp_(-1, 1)
    return ascending[torch.bucketize(shares.contiguous(), middles, out_int32=True)]


def values_of(q: Tensor, codebook: Codebook) -> Tensor:
    """Return the numbers in float32 that codes stand for, of the same shape."""
    return torch.tensor(codebook.values)[q.int()]


@cache
def _middles(codebook: Codebook) -> tuple[Tensor, Tensor]:
    """The codes in the order of their values, int8, and the middles between one and the next, float32."""
    ascending = torch.tensor(codebook.ascending, dtype=torch.int8)
    ordered = torch.tensor(codebook.values)[ascending.int()]
    return ascending, (ordered[:-1] + ordered[1:]) / 2
