"""Codebook: the numbers that the codes of a format stand for, and where bitsandbytes and ONNX Runtime agree on them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Codebook:
    """Sixteen numbers between -1 and 1; a weight is one of them times the largest magnitude of its group.

    values: by code, as bitsandbytes holds them in float32 (`functional.get_4bit_type`).
    ascending: the codes in the order of their values. Of two codes of one value, the first is for what lies below it.
    group_sizes: those that both bitsandbytes and MatMulBnb4 take. default_group: where a scheme names none, bitsandbytes' own.
    """

    values: tuple[float, ...]
    ascending: tuple[int, ...]
    group_sizes: tuple[int, ...] = (32, 64, 128, 256)
    default_group: int = 64

    @property
    def largest_step(self) -> float:
        """The largest distance of two neighbours."""
        ordered = [self.values[code] for code in self.ascending]
        return max(above - below for below, above in pairwise(ordered))


# 4-bit NormalFloat: quantiles of the normal distribution, asymmetric so that 0 is one of them.
# Source: T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, appendix E.
NORMAL_FLOAT = Codebook(
    values=(
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    ascending=tuple(range(16)),
)  # fmt: skip

# Floats of a sign, 2 bits of exponent and 1 of fraction, divided by the largest: bitsandbytes' order of them, in which the
# magnitudes of codes 0 to 7 are 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6 and 1/4, and both codes 0 and 8 stand for 0.
FLOAT = Codebook(
    values=(
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
    ascending=(11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
)  # fmt: skip
