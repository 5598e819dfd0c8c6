"""NumberFormat: how one weight is coded, and how its codes lie in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from qconvert.ir.codebook import FLOAT, NORMAL_FLOAT, Codebook

if TYPE_CHECKING:
    from torch import Tensor

# The block sizes that ONNX Runtime's MatMulNBits has kernels for.
GROUP_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """Signed integers of a number of bits, with a scale and perhaps a zero point; or places in a codebook, with a scale.

    name: as schemes have it. layout_type: as compressed-tensors has it, beside the bits.
    signed_maximum: whether symmetric scales follow the signed maximum, so that the lowest code is used; else codes are
        balanced, and the lowest one is left out.
    scale_bits, asymmetric_scale_bits: significant bits of a scale in float16. With those of int4, (q - zero_point) * scale, 3
        bits and a sign by 8 or 4 bits by 7, is exact even in float16 arithmetic; 8-bit codes leave no room for that.
    codebook: the numbers that codes stand for; None where a code is itself the number.
    """

    name: str
    bits: int
    signed_maximum: bool
    scale_bits: int
    asymmetric_scale_bits: int
    layout_type: str = "int"
    codebook: Codebook | None = None

    @property
    def family(self) -> str:
        """The name without the bits, "int" of int4: what a code is."""
        return self.name.removesuffix(str(self.bits))

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """The numbers of inputs that may share a scale, but for a whole row of them."""
        return GROUP_SIZES if self.codebook is None else self.codebook.group_sizes

    @property
    def largest_step(self) -> float:
        """The largest distance of two neighbouring numbers, in scales."""
        return 1.0 if self.codebook is None else self.codebook.largest_step

    def code_range(self, *, symmetric: bool) -> tuple[int, int]:
        """Return the smallest and the largest code."""
        if self.codebook is not None:
            return 0, len(self.codebook.values) - 1
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return (-high, high) if symmetric and not self.signed_maximum else (low, high)

    @property
    def offset(self) -> int:
        """The number that makes a code unsigned when it is added, as codes are packed."""
        from qconvert.ir.packing import offset_of  # here: recipes and --help need no torch

        return offset_of(self.bits)

    @property
    def exact_in_float16(self) -> bool:
        """Whether (q - zero_point) * scale loses nothing in float16 arithmetic."""
        return self.bits + self.scale_bits <= FLOAT16_BITS + 1

    def pack(self, q: Tensor) -> Tensor:
        """Pack signed codes [rows, columns] int8 into bytes [rows, ceil(columns * bits / 8)] uint8, low nibble first."""
        from qconvert.ir.packing import pack_codes

        return pack_codes(q, self.bits)

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Undo `pack`."""
        from qconvert.ir.packing import unpack_codes

        return unpack_codes(packed, self.bits, columns)


FLOAT16_BITS = 11
# bitsandbytes holds scales in float32, whatever the dtype of the model.
NF4 = NumberFormat("nf4", 4, signed_maximum=False, scale_bits=24, asymmetric_scale_bits=24, codebook=NORMAL_FLOAT)
FP4 = NumberFormat("fp4", 4, signed_maximum=False, scale_bits=24, asymmetric_scale_bits=24, codebook=FLOAT)
INT4 = NumberFormat("int4", 4, signed_maximum=True, scale_bits=8, asymmetric_scale_bits=7)
INT8 = NumberFormat("int8", 8, signed_maximum=False, scale_bits=11, asymmetric_scale_bits=11)
FORMATS: Mapping[str, NumberFormat] = MappingProxyType({each.name: each for each in (INT4, INT8, NF4, FP4)})
