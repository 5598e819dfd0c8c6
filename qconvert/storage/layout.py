"""The layout of a quantized layer in model.safetensors: compressed-tensors', or bitsandbytes' where it has a codebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from qconvert.ir.layer_form import LayerForm
from qconvert.ir.plan import LayerPlan
from qconvert.ir.quantized import QuantizedTensor
from qconvert.storage import bitsandbytes, compressed_tensors

ALL = slice(None)
# The order in a block: tensors of one suffix are adjacent, so that one external initializer can span q, k and v.
SUFFIXES = tuple(dict.fromkeys((*compressed_tensors.SUFFIXES, *bitsandbytes.SUFFIXES)))


def encode(plan: LayerPlan, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors by suffix, as `plan.disk_tensors` says."""
    return bitsandbytes.encode(plan, tensor) if has_codebook(plan) else compressed_tensors.encode(plan, tensor)


def decode(plan: LayerPlan, tensors: Mapping[str, Tensor], rows: slice | Tensor = ALL) -> QuantizedTensor:
    """Undo `encode`, without smoothing scale and outliers: those are in the sidecar. rows: which output channels."""
    return bitsandbytes.decode(plan, tensors, rows) if has_codebook(plan) else compressed_tensors.decode(plan, tensors, rows)


def has_codebook(plan: LayerPlan) -> bool:
    """Return whether a layer has the layout of bitsandbytes."""
    return plan.form is LayerForm.CODEBOOK_WEIGHTS


def transformers_refuses(layers: Iterable[LayerPlan], *, outliers: bool = False) -> str | None:
    """Return why transformers could not load these layers from one folder, as half a sentence; None if it can.

    outliers: the quantizer keeps float columns beside the int8 matrix (llm-int8).
    """
    layers = tuple(layers)
    if any(map(has_codebook, layers)):
        return bitsandbytes.transformers_refuses(layers)
    return compressed_tensors.transformers_refuses(layers, outliers=outliers)
