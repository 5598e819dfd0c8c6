"""The layout of a layer with a codebook in model.safetensors, that of bitsandbytes, which its Linear4bit and MatMulBnb4 read.

weight                              uint8 [out * in / 2, 1]: two codes a byte, the first in the upper half
weight.absmax                       a scale for every group, float32, or with double quantization uint8
weight.quant_map                    float32 [16], the codebook
weight.nested_absmax                float32, with double quantization a scale for every 256 of those
weight.nested_quant_map             float32 [256], the numbers that codes of scales stand for
weight.quant_state.bitsandbytes__*  uint8, JSON: group size, shape, dtype, offset of the scales; * is nf4 or fp4
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qconvert.ir.double_quant import NestedScale, dynamic_map
from qconvert.ir.plan import LayerPlan
from qconvert.ir.quant_state import quant_state, quant_state_offset, state_suffix
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import CODEBOOKS, QuantScheme

STATES = tuple(map(state_suffix, CODEBOOKS))
# The order in a block, beside the suffixes of compressed-tensors (storage/layout.py).
SUFFIXES = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *STATES)


def encode(plan: LayerPlan, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors by suffix, as `plan.disk_tensors` says."""
    scheme, shape, nested = plan.scheme, (plan.out_features, plan.in_features), tensor.nested_scale
    codebook = scheme.codebook
    assert codebook is not None
    codes = tensor.q.view(torch.uint8).flatten()
    tensors = {
        "weight": (codes[0::2] << 4 | codes[1::2]).unsqueeze(1),
        "weight.absmax": (tensor.scale if nested is None else nested.q).flatten(),
        "weight.quant_map": torch.tensor(codebook.values),
    }
    if nested is not None:
        tensors |= {"weight.nested_absmax": nested.scale, "weight.nested_quant_map": dynamic_map()}
    state = quant_state(scheme, shape, plan.dtype, 0.0 if nested is None else nested.offset.item())
    return tensors | {state_suffix(scheme.format): torch.frombuffer(bytearray(state), dtype=torch.uint8)}


def decode(plan: LayerPlan, tensors: Mapping[str, Tensor], rows: slice | Tensor) -> QuantizedTensor:
    """Undo `encode`. rows: which output channels; a nested scale is given with those of all."""
    packed = tensors["weight"].reshape(plan.out_features, -1)[rows]
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(packed.shape[0], -1).view(torch.int8)
    scale = tensors["weight.absmax"].reshape(plan.out_features, -1)
    if not plan.scheme.double_quant:
        return QuantizedTensor(codes, scale[rows], None, plan.scheme)
    offset = torch.tensor(quant_state_offset(tensors[state_suffix(plan.scheme.format)].numpy().tobytes()))
    nested = NestedScale(scale, tensors["weight.nested_absmax"], offset)
    whole = isinstance(rows, slice) and rows == slice(None)
    return QuantizedTensor(codes, nested.dequantize()[rows], None, plan.scheme, nested_scale=nested if whole else None)


def transformers_refuses(layers: Iterable[LayerPlan]) -> str | None:
    """Return why transformers could not load these layers, one of which has a codebook, from one folder, as half a sentence;
    None if it can.

    config.json names one method for all layers, and of bitsandbytes one format. Group sizes may differ.
    """
    layers = tuple(layers)
    first = next(layer for layer in layers if layer.scheme.codebook is not None)
    for layer in layers:
        if layer.scheme.format is not first.scheme.format or layer.scheme.double_quant != first.scheme.double_quant:
            return (
                f"'{first.name}' is {first.scheme}, which transformers loads with bitsandbytes, and then every quantized layer "
                f"has to be one of {_family(first.scheme)}, but '{layer.name}' is {layer.scheme}"
            )
        if layer.weight_read:
            return f"'{layer.name}' ({layer.scheme}) has a weight that the model's own code looks at, and bitsandbytes packs it"
    return None


def _family(scheme: QuantScheme) -> str:
    """Word what config.json says of all layers."""
    return f"{scheme.format.name}-gN{'-dq' if scheme.double_quant else ''}"
