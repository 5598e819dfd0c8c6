"""The bytes of quantized tensors, as compressed-tensors and ONNX Runtime lay them out.

int4 and int8 codes are stored unsigned, u = q + 2^(bits-1), low nibble first along the input axis. For a
little-endian machine these bytes serve both readers: compressed-tensors' int32 `weight_packed` and
MatMulNBits' `B`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Packing takes a few copies of the codes, so that those of a large head are not packed all at once.
CODES_AT_ONCE = 2**24


def offset_of(bits: int) -> int:
    """Return the number that makes codes of so many bits unsigned when it is added."""
    return int(2 ** (bits - 1))


def pack_codes(q: Tensor, bits: int) -> Tensor:
    """Pack signed codes [rows, columns] int8 into bytes [rows, ceil(columns * bits / 8)] uint8.

    int4: byte j holds u[2j] | u[2j+1] << 4; an odd last nibble is padded with 0.

    Raises ValueError for a number of bits that no layout packs.
    """
    unsigned: Tensor = q.contiguous().view(torch.uint8) + offset_of(bits)  # modulo 256, as two's complement wants it
    match bits:
        case 8:
            return unsigned
        case 4:
            if unsigned.shape[1] % 2:
                unsigned = torch.nn.functional.pad(unsigned, (0, 1))
            packed: Tensor = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
            return packed
    raise ValueError(f"codes of {bits} bits are not packed by any layout")


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_codes`: bytes [rows, ceil(columns * bits / 8)] become signed codes [rows, columns] int8."""
    match bits:
        case 4:
            packed = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(packed.shape[0], -1)[:, :columns]
        case 8:
            pass
        case _:
            raise ValueError(f"codes of {bits} bits are not packed by any layout")
    codes: Tensor = (packed - offset_of(bits)).view(torch.int8)
    return codes


def pack_int32(q: Tensor, bits: int) -> Tensor:
    """Pack codes [rows, columns] into int32 [rows, ceil(columns * bits / 32)], compressed-tensors' pack-quantized form."""
    rows = max(1, CODES_AT_ONCE // max(q.shape[1], 1))
    return torch.cat([_pack_int32(part, bits) for part in torch.split(q, rows)])


def _pack_int32(q: Tensor, bits: int) -> Tensor:
    packed = pack_codes(q, bits)
    padding = -packed.shape[1] % 4
    if padding:
        packed = torch.nn.functional.pad(packed, (0, padding))
    # Flat first: a single row or column may be "contiguous" with strides that view() does not take.
    return packed.flatten().view(torch.int32).reshape(packed.shape[0], -1)


def unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_int32`: int32 [rows, words] becomes codes [rows, columns] int8."""
    octets = packed.flatten().view(torch.uint8).reshape(packed.shape[0], -1)
    return unpack_codes(octets[:, : -(-columns * bits // 8)], bits, columns)


def pack_zero_point_int32(zero_point: Tensor, bits: int) -> Tensor:
    """Pack zero points [out, groups] along the *output* axis, as compressed-tensors: int32 [ceil(out * bits / 32), groups]."""
    return pack_int32(zero_point.T.contiguous(), bits).T.contiguous()


def unpack_zero_point_int32(packed: Tensor, bits: int, out_features: int) -> Tensor:
    """Undo `pack_zero_point_int32`: zero points are [out, groups] int8 again."""
    return unpack_int32(packed.T.contiguous(), bits, out_features).T.contiguous()
