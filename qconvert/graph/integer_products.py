"""The pairs of types that ONNX Runtime's CPU kernels for integer products multiply exactly, on every processor it runs on.

x86-64 processors with AVX2 but without VNNI multiply unsigned by signed bytes with VPMADDUBSW, which adds pairs of products
in 16 bits and saturates. Processors with VNNI or AMX, those without AVX2, and ARM64 are exact. Measured with random codes over
the whole range (tests/export/test_processors.py does it again, on emulated processors); docs/processors.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx_ir import DataType

U8, S8 = DataType.UINT8, DataType.INT8
Pair = tuple[DataType, DataType]


@dataclass(frozen=True, slots=True)
class IntegerProduct:
    """One operator. Pairs are (type of activations, type of weights); a pair that is in neither set has no kernel.

    activations, weights: index of the input; where activations come in float, the kernel makes them unsigned itself.
    exact: on every processor. saturates: on some.
    """

    activations: int
    weights: int
    exact: frozenset[Pair]
    saturates: frozenset[Pair]


PRODUCTS = {
    "MatMulInteger": IntegerProduct(0, 1, frozenset({(U8, U8), (S8, S8), (S8, U8)}), frozenset({(U8, S8)})),
    "MatMulIntegerToFloat": IntegerProduct(0, 1, frozenset({(U8, U8), (S8, S8)}), frozenset({(U8, S8)})),
    "DynamicQuantizeMatMul": IntegerProduct(0, 1, frozenset({(U8, U8)}), frozenset({(U8, S8)})),
    "QLinearMatMul": IntegerProduct(0, 3, frozenset({(U8, U8), (S8, S8)}), frozenset({(U8, S8)})),
    "QLinearConv": IntegerProduct(0, 3, frozenset({(U8, U8), (S8, S8)}), frozenset({(U8, S8)})),
    "QGemm": IntegerProduct(0, 3, frozenset({(U8, U8), (S8, S8)}), frozenset({(U8, S8)})),
    # Its left operand are the weights, so that the other mixed pair saturates.
    "ConvInteger": IntegerProduct(0, 1, frozenset({(U8, U8), (U8, S8), (S8, S8)}), frozenset({(S8, U8)})),
}

# The product that tells whether unsigned by signed bytes saturate: as large as bytes get, and with enough rows for the kernels
# that take several at once. Each of its sums is PROBE_SUM where the kernel is exact.
PROBE = np.full((16, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
PROBE_SUM = 255 * 127 * 64
