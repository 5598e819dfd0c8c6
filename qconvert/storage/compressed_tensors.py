"""The layout of a quantized layer in model.safetensors, that of compressed-tensors, and the limits of its readers.

    pack-quantized   weight_packed, weight_scale, weight_shape [, weight_zero_point packed along the outputs]
    int-quantized    weight (int8), weight_scale [, weight_zero_point]: layers with int8 activations

Per-tensor scales are repeated per output channel, because the layout has no fast form of its own for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qconvert.ir import affine, packing
from qconvert.ir.plan import LayerPlan
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import PerGroup, PerTensor

# The order in a block.
SUFFIXES = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape")


def encode(plan: LayerPlan, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors by suffix, as `plan.disk_tensors` says; a scale beyond float16 is float32."""
    out, bits = plan.out_features, plan.scheme.bits
    packed = plan.form.is_packed
    tensors = {
        "weight_packed" if packed else "weight": packing.pack_int32(tensor.q, bits) if packed else tensor.q,
        "weight_scale": affine.stored_scale(tensor.scale, plan.scheme).expand(out, -1),
    }
    if packed:
        tensors["weight_shape"] = torch.tensor([out, plan.in_features])
    if tensor.zero_point is not None:
        zero_point = tensor.zero_point.expand(out, -1)
        tensors["weight_zero_point"] = packing.pack_zero_point_int32(zero_point, bits) if packed else zero_point
    return tensors


def decode(plan: LayerPlan, tensors: Mapping[str, Tensor], rows: slice | Tensor) -> QuantizedTensor:
    """Undo `encode`, without smoothing scale and outliers: those are in the sidecar. rows: which output channels."""
    scheme = plan.scheme
    scaled = slice(1) if isinstance(scheme.granularity, PerTensor) else rows
    zero_point = tensors.get("weight_zero_point")
    if "weight" in tensors:
        q = tensors["weight"][rows]
    else:
        q = packing.unpack_int32(tensors["weight_packed"][rows], scheme.bits, plan.in_features)
        if zero_point is not None:
            zero_point = packing.unpack_zero_point_int32(zero_point, scheme.bits, plan.out_features)
    return QuantizedTensor(
        q, tensors["weight_scale"][scaled].float(), None if zero_point is None else zero_point[scaled], scheme
    )


def config_group(plan: LayerPlan, *, outliers: bool) -> dict[str, Any]:
    """Return the layer's scheme in the words of compressed-tensors' `config_groups`, without targets.

    outliers: some layer of the model keeps float columns, so the int8 matrices are meant for float activations.
    """
    scheme = plan.scheme
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": scheme.format.layout_type,
        "symmetric": scheme.symmetric,
        "dynamic": False,
    }
    if isinstance(scheme.granularity, PerGroup):
        weights |= {"strategy": "group", "group_size": scheme.granularity.group_size}
    else:
        weights |= {"strategy": "channel"}
    activations = None
    if scheme.activations and not outliers:
        how = scheme.activations
        activations = {
            "num_bits": how.bits,
            "type": "int",
            "symmetric": True,
            "strategy": how.granularity,
            "dynamic": how.dynamic,
        }
    return {
        "format": "pack-quantized" if plan.form.is_packed else "int-quantized",
        "input_activations": activations,
        "output_activations": None,
        "weights": weights,
    }


def dequantizes_exactly(plan: LayerPlan) -> bool:
    """Return whether nothing is lost with `"dequantize": true`: transformers then multiplies in the dtype of the scales, and
    float16 holds codes of 4 bits times scales that `affine.round_scale` has rounded, but not codes of 8 bits.
    """
    return plan.scheme.format.exact_in_float16 or plan.scheme.scale_dtype == torch.float32


def must_dequantize(plan: LayerPlan, *, outliers: bool) -> bool:
    """Return whether transformers can load the layer only with `"dequantize": true`.

    Measured with transformers 5.23 and compressed-tensors 0.20: packed zero points fail with a shape mismatch, and
    int-quantized weights without quantized activations fail at the first forward, and a packed embedding can't be looked
    up in. A packed layer has no `weight` that a model could look at. All load with `dequantize`.
    """
    if plan.form.is_packed:
        return plan.form.is_embedding or plan.weight_read or not plan.scheme.symmetric
    return plan.form.is_embedding or outliers


def transformers_refuses(layers: Iterable[LayerPlan], *, outliers: bool = False) -> str | None:
    """Return why transformers could not load these layers from one folder, as half a sentence; None if it can.

    outliers: the quantizer keeps float columns beside the int8 matrix (llm-int8).

    With `"dequantize": true`, transformers applies the first group's scheme to every layer (silently wrong, or an
    error), so a layer that needs it allows no second scheme beside it. Everything else mixes freely.
    """
    layers = tuple(layers)
    for layer in layers:
        if layer.kind not in ("linear", "embedding"):
            return (
                f"'{layer.name}' is a {layer.kind}, and the transformers layout holds quantized nn.Linear and nn.Embedding only"
            )
        if layer.scheme.is_static:
            return f"'{layer.name}' ({layer.scheme}) reads codes in ranges that calibration finds, which only the graph knows"
    groups: list[tuple[LayerPlan, dict[str, Any]]] = []
    for layer in layers:
        group = config_group(layer, outliers=outliers)
        if all(group != known for _, known in groups):
            groups.append((layer, group))
    needy = next((layer for layer in layers if must_dequantize(layer, outliers=outliers)), None)
    if needy is None:
        return None
    if not dequantizes_exactly(needy):
        return (
            f"'{needy.name}' ({needy.scheme}) {_trait(needy)}, so that transformers dequantizes it, in the float16 of its "
            "scales: 8-bit codes do not fit there (int8-channel has float32 scales)"
        )
    if len(groups) == 1:
        return None
    other = next(layer for layer, group in groups if group != config_group(needy, outliers=outliers))
    return (
        f"'{needy.name}' ({needy.scheme}) {_trait(needy)}, which transformers loads only where every quantized layer has the "
        f"same scheme, but '{other.name}' is {other.scheme}"
    )


def _trait(needy: LayerPlan) -> str:
    """Name what makes a layer one that must be dequantized."""
    if needy.form.is_embedding:
        return "is an embedding"
    if not needy.scheme.symmetric:
        return "has zero points"
    return "has a weight that the model's own code looks at" if needy.weight_read else "has outlier columns"
