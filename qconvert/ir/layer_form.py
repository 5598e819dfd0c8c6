"""LayerForm: what a layer becomes on disk and in graphs."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qconvert.ir.layer import LayerKind
    from qconvert.ir.scheme import QuantScheme


class LayerForm(Enum):
    """The closed set of forms. Who writes, exports, plans or verifies a layer matches on these.

    PACKED_WEIGHTS: packed codes, float activations (MatMulNBits).
    CODEBOOK_WEIGHTS: packed places in a codebook, float activations (MatMulBnb4), in the layout of bitsandbytes.
    INT8_ROWS: signed bytes; every row of the input is quantized with a step of its own.
    INT8_STATIC: signed bytes; the input is quantized in a range that calibration has found. Linears and convolutions.
    PACKED_STATIC: packed codes, dequantized when the model is loaded, and an input that is quantized in such a range: what was
        trained with few bits computes with them, in float. Linears and convolutions.
    PACKED_EMBEDDING, INT8_EMBEDDING: the same bytes, whose rows are gathered.
    CONVOLUTION: packed codes, dequantized when the model is loaded: small on disk, float at run time.
    FLOAT: as it is in the source.
    """

    PACKED_WEIGHTS = "packed weights"
    CODEBOOK_WEIGHTS = "codebook weights"
    INT8_ROWS = "int8 rows"
    INT8_STATIC = "int8 static"
    PACKED_STATIC = "packed static"
    PACKED_EMBEDDING = "packed embedding"
    INT8_EMBEDDING = "int8 embedding"
    CONVOLUTION = "convolution"
    FLOAT = "float"

    @staticmethod
    def of(kind: LayerKind, scheme: QuantScheme) -> LayerForm:
        """Return the form of a layer that is quantized."""
        if scheme.is_static and kind != "embedding":
            return LayerForm.INT8_STATIC if scheme.bits == 8 else LayerForm.PACKED_STATIC
        match kind:
            case "conv2d":
                return LayerForm.CONVOLUTION
            case "embedding":
                return LayerForm.INT8_EMBEDDING if scheme.activations and scheme.bits == 8 else LayerForm.PACKED_EMBEDDING
            case "linear" | "conv1d":
                if scheme.codebook is not None:
                    return LayerForm.CODEBOOK_WEIGHTS
                return LayerForm.INT8_ROWS if scheme.activations else LayerForm.PACKED_WEIGHTS

    @property
    def is_packed(self) -> bool:
        """Whether codes are packed into words (pack-quantized), as neither signed bytes (int-quantized) nor codebooks are."""
        return self in (
            LayerForm.PACKED_WEIGHTS,
            LayerForm.PACKED_STATIC,
            LayerForm.PACKED_EMBEDDING,
            LayerForm.CONVOLUTION,
        )

    @property
    def is_static(self) -> bool:
        """Whether it reads codes in a range that calibration, or training, has found."""
        return self in (LayerForm.INT8_STATIC, LayerForm.PACKED_STATIC)

    @property
    def is_embedding(self) -> bool:
        """Whether it gathers rows, where other forms multiply."""
        return self in (LayerForm.PACKED_EMBEDDING, LayerForm.INT8_EMBEDDING)

    @property
    def as_product(self) -> LayerForm:
        """The form of an output head that shares the bytes of an embedding; any other form is its own."""
        match self:
            case LayerForm.PACKED_EMBEDDING:
                return LayerForm.PACKED_WEIGHTS
            case LayerForm.INT8_EMBEDDING:
                return LayerForm.INT8_ROWS
            case _:
                return self
