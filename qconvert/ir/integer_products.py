"""Which pairs of types ONNX Runtime's CPU kernels for integer products multiply exactly, on every processor it runs on.

x86-64 processors with AVX2 but without VNNI multiply unsigned by signed bytes with VPMADDUBSW, which adds pairs of products
in 16 bits and saturates. Processors with VNNI or AMX, those without AVX2, and ARM64 are exact. Measured with random codes over
the whole range (tests/test_processors.py does it again, on emulated processors); docs/processors.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    # Its left operand are the weights, so that the other mixed pair saturates.
    "ConvInteger": IntegerProduct(0, 1, frozenset({(U8, U8), (U8, S8), (S8, S8)}), frozenset({(S8, U8)})),
}
