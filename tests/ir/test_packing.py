"""The bytes of quantized tensors, against golden bytes and against compressed-tensors' own packing."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from qconvert.ir import packing
from qconvert.storage.digest import tensor_bytes

# Rows and columns whose packed width is and isn't a whole number of 32-bit words, single rows and columns too.
SHAPES = [(3, 16), (3, 5), (4, 7), (1, 8), (8, 1), (1, 1), (1, 3)]


def codes(shape: tuple[int, int], bits: int) -> torch.Tensor:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    return torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


def test_int4_codes_are_unsigned_nibbles_low_first() -> None:
    assert bytes(tensor_bytes(packing.pack_codes(torch.tensor([[-8, 7, 0, 1]], dtype=torch.int8), 4))) == b"\xf0\x98"


def test_an_odd_int4_row_ends_in_a_zero_nibble() -> None:
    assert bytes(tensor_bytes(packing.pack_codes(torch.tensor([[-1, -8, 3]], dtype=torch.int8), 4))) == b"\x07\x0b"


def test_int8_codes_are_offset_by_128() -> None:
    assert bytes(tensor_bytes(packing.pack_codes(torch.tensor([[-128, 0, 127]], dtype=torch.int8), 8))) == b"\x00\x80\xff"


def test_the_bytes_of_int32_words_are_those_of_the_kernel() -> None:
    q = codes((3, 16), 4)
    assert bytes(tensor_bytes(packing.pack_int32(q, 4))) == bytes(tensor_bytes(packing.pack_codes(q, 4)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestAgainstCompressedTensors:
    def test_weights_pack_to_the_same_words(self, shape: tuple[int, int], bits: int) -> None:
        q = codes(shape, bits)
        assert torch.equal(packing.pack_int32(q, bits), pack_to_int32(q, bits))

    def test_weights_unpack_from_the_same_words(self, shape: tuple[int, int], bits: int) -> None:
        q = codes(shape, bits)
        assert torch.equal(packing.unpack_int32(pack_to_int32(q, bits), bits, shape[1]), q)

    def test_zero_points_pack_along_the_outputs(self, shape: tuple[int, int], bits: int) -> None:
        q = codes(shape, bits)
        packed = packing.pack_zero_point_int32(q, bits)
        assert torch.equal(packed, pack_to_int32(q, bits, packed_dim=0))
        assert torch.equal(unpack_from_int32(packed, bits, torch.Size(shape), packed_dim=0), q)
        assert torch.equal(packing.unpack_zero_point_int32(packed, bits, shape[0]), q)
