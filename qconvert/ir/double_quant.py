"""Double quantization: the scales of a codebook as codes of 8 bits, less their mean, with a scale for every 256 of them.

Codes stand for the numbers of a dynamic map, whose steps are as fine as the numbers are small. bitsandbytes looks a number up
in a table of 65536 places, so that near the middle of two it does not always take the nearer one; so does this, for the codes
are to be the same.

Sources: T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, section 3; T. Dettmers, "8-Bit
Approximations for Parallelism in Deep Learning", 2016, for the map; bitsandbytes 0.50, `quantize_blockwise` on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Scales that share a scale, as bitsandbytes' loaders and kernels want it.
BLOCK = 256
NUMBERS = 256
EXPONENTS = 7
PLACES = 65536


@dataclass(frozen=True, slots=True, eq=False)
class NestedScale:
    """scale ~ map[q] * scale of its block + offset.

    q: [out, groups] uint8. scale: [ceil(out * groups / 256)] float32, of 256 consecutive codes each. offset: [] float32.
    """

    q: Tensor
    scale: Tensor
    offset: Tensor

    def dequantize(self) -> Tensor:
        """Return the scales that weights are computed with, [out, groups] float32."""
        count = self.q.numel()
        steps = self.scale.repeat_interleave(BLOCK)[:count]
        return (dynamic_map()[self.q.flatten().int()] * steps).add_(self.offset).reshape(self.q.shape)


def nested(scale: Tensor) -> NestedScale:
    """Quantize scales [out, groups] float32, whose mean becomes the offset."""
    flat = scale.flatten()
    offset = flat.mean()
    if not torch.isfinite(offset):  # the sum has left float32, where bitsandbytes gives no numbers at all
        offset = flat.double().mean().float()
    blocks = torch.nn.functional.pad(flat - offset, (0, -flat.numel() % BLOCK)).reshape(-1, BLOCK)
    largest = blocks.abs().amax(-1)
    shares = (blocks * (1 / largest).unsqueeze(-1)).nan_to_num_(-1).clamp_(-1, 1)  # NaN in a block of zeros
    places = ((shares + 1) * ((PLACES - 1) / 2) + 0.5).int()
    q = _nearest()[places].flatten()[: flat.numel()].reshape(scale.shape)
    return NestedScale(q, largest, offset)


@cache
def dynamic_map() -> Tensor:
    """Return the NUMBERS of them, ascending, float32: 0, 1, and the middles of 2^i equal parts of [0.1, 1] times 10^(i - 6)."""
    values = [0.0, 1.0]
    for exponent in range(EXPONENTS):
        ends = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (10 ** (exponent - EXPONENTS + 1) * ((ends[:-1] + ends[1:]) / 2)).tolist()
        values += middles + [-value for value in middles]
    return torch.tensor(sorted(values))


@cache
def _nearest() -> Tensor:
    """The code of the number that is nearest to each of the PLACES between -1 and 1, uint8."""
    numbers = dynamic_map()
    places = torch.arange(PLACES) / ((PLACES - 1) / 2) - 1
    return torch.bucketize(places, (numbers[:-1] + numbers[1:]) / 2).to(torch.uint8)
