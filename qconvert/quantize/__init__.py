"""Quantize: each block's layers through the quantizer, checked before anyone else sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.finite import require_finite
from qconvert.ir.layer import Block, BlockSamples, Layer
from qconvert.ir.plan import Plan
from qconvert.ir.progress import Progress
from qconvert.ir.quantized import QuantizedBlock, QuantizedLayer, QuantizedTensor
from qconvert.plugin.host import contract
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.quantize.fold import Folded, fold
from qconvert.quantize.tune import tune
from qconvert.recipe.fields import Tuning


def quantize(
    blocks: Iterable[Block],
    plan: Plan,
    quantizer: Quantizer,
    progress: Progress,
    *,
    keep_unfolded: bool,
    tuning: Tuning | None = None,
) -> Iterator[QuantizedBlock]:
    """Quantize block after block, lazily: nothing of a block is kept once the next is asked for.

    keep_unfolded: input scales that can't be folded stay in the graph (`--layout onnx`).
    tuning: how blocks that have samples are tuned, None where they are not.

    Raises InputError QC-WEIGHT-001 for weights that are not finite; PluginError for a quantizer that breaks its contract.
    """
    for block in blocks:
        yield quantize_block(block, plan, quantizer, keep_unfolded=keep_unfolded, tuning=tuning)
        progress.advance()


def quantize_block(
    block: Block, plan: Plan, quantizer: Quantizer, *, keep_unfolded: bool, tuning: Tuning | None = None
) -> QuantizedBlock:
    """`quantize` for one block."""
    schemes = {name: layer.scheme for name, layer in plan.layers.items()}
    for layer in block.layers:
        require_finite(f"{layer.name}.weight", layer.weight)
    folded = fold(block, quantizer, schemes, keep_unfolded)
    tensors = {}
    for layer in folded.block.layers:
        if layer.kind == "embedding" and quantizer.observers:  # it has no input to weigh its errors by
            tensor = round_to_nearest(layer.weight, schemes[layer.name])
        else:
            tensor = contract.quantize(quantizer, layer, schemes[layer.name])
        if layer.name in folded.input_scales:
            tensor = dataclasses.replace(tensor, input_scale=folded.input_scales[layer.name])
        tensors[layer.name] = tensor
    if tuning is not None and block.samples is not None:
        tensors |= _tuned(folded, tensors, block.samples, tuning)
    layers = tuple(
        QuantizedLayer(layer.name, tensors[layer.name], _relative_error(layer, tensors[layer.name]))
        for layer in folded.block.layers
    )
    return QuantizedBlock(block.name, layers, folded.tensors)


def _tuned(
    folded: Folded, tensors: Mapping[str, QuantizedTensor], samples: BlockSamples, tuning: Tuning
) -> dict[str, QuantizedTensor]:
    """The linears of a block, tuned; convolutions and embeddings keep their codes."""
    layers = {layer.name: layer for layer in folded.block.layers if layer.kind in ("linear", "conv1d")}
    return tune(layers, {name: tensors[name] for name in layers}, samples, folded.tensors, tuning) if layers else {}


def _relative_error(layer: Layer, tensor: QuantizedTensor) -> float:
    """||W - dequantize(q)|| / ||W|| in the scaled space that q lives in; 0 for an all-zero weight."""
    scaled = dataclasses.replace(tensor, input_scale=None)
    difference = total = 0.0
    for rows in affine.row_blocks(*layer.weight.shape):
        weight = layer.weight[rows]
        difference += _square_norm(scaled.rows(rows).dequantize() - weight)
        total += _square_norm(weight)
    return (difference / total) ** 0.5 if total else 0.0


def _square_norm(values: Tensor) -> float:
    """In float64: squares of what float32 holds over- and underflow it."""
    return float(values.double().square_().sum())
