"""The quant state of bitsandbytes: what its loaders must know of a weight beside the tensors, as JSON in a tensor of bytes."""

from __future__ import annotations

import json

import torch

from qconvert.ir.double_quant import BLOCK
from qconvert.ir.number_format import NumberFormat
from qconvert.ir.scheme import QuantScheme

# The text is filled up with spaces, which JSON allows: tensors behind it lie at whole words, and its length is known before
# the offset is, of which Python writes at most 24 characters.
ALIGNMENT = 8
OFFSET_CHARACTERS = 24


def state_suffix(number_format: NumberFormat) -> str:
    """Return the suffix of the tensor, from which loaders know the format."""
    return f"weight.quant_state.bitsandbytes__{number_format.name}"


def quant_state(scheme: QuantScheme, shape: tuple[int, int], dtype: torch.dtype, offset: float = 0.0) -> bytes:
    """Return the state of a weight [out, in].

    dtype: what the weight becomes where bitsandbytes dequantizes it. offset: of scales with double quantization.
    """
    state: dict[str, object] = {
        "quant_type": scheme.format.name,
        "blocksize": scheme.group_size(shape[1]),
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
    }
    filling = ""
    if scheme.double_quant:
        state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        filling = " " * (OFFSET_CHARACTERS - len(json.dumps(offset)))
    text = json.dumps(state) + filling
    return (text + " " * (-len(text) % ALIGNMENT)).encode("ascii")


def quant_state_offset(state: bytes) -> float:
    """Return the offset that a state holds."""
    return float(json.loads(state)["nested_offset"])
