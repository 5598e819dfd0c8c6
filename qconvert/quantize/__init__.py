"""Quantize: each block's layers through the quantizer, checked before anyone else sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from qconvert.execution.unit import DifferentiableBlock
from qconvert.ir import affine
from qconvert.ir.finite import require_finite
from qconvert.ir.layer import Block, Layer
from qconvert.ir.quantized import QuantizedBlock, QuantizedLayer, QuantizedTensor
from qconvert.job import Job
from qconvert.plugin.host import contract
from qconvert.plugin.quantizer import round_to_nearest
from qconvert.plugin.tuner import BlockTuner
from qconvert.quantize.fold import fold
from qconvert.quantize.folded import Folded


def quantize(block: Block, job: Job) -> QuantizedBlock:
    """Quantize the layers of a block, its smoothing scales folded where they can be, and tune them where the job says so.

    Raises UsageError QC-CALIB-001 for layers whose input was never seen, InputError QC-WEIGHT-001 for weights that are not
    finite; PluginError for a quantizer or a tuner that breaks its contract.
    """
    block.require_seen()
    quantizer = job.quantizer
    schemes = {layer.name: job.plan.layers[layer.name].scheme for layer in block.layers}
    for layer in block.layers:
        require_finite(f"{layer.name}.weight", layer.weight)
    folded = fold(block, job)
    layers = {}
    for layer in folded.layers():
        if layer.kind == "embedding" and quantizer.observers:  # it has no input to weigh its errors by
            tensor = round_to_nearest(layer.weight, schemes[layer.name])
        else:
            tensor = contract.quantize(quantizer, layer, schemes[layer.name])
        if layer.name in folded.smoothing_scales:
            tensor = dataclasses.replace(tensor, smoothing_scale=folded.smoothing_scales[layer.name])
        layers[layer.name] = _finished(layer, tensor)
    if block.samples is not None and job.tuner is not None:
        samples = DifferentiableBlock(job.model, block.name, block.samples, job.recipe.device)
        layers |= _tuned(folded, layers, samples, job.tuner)
    return QuantizedBlock(block.name, tuple(layers.values()), folded.tensors)


def _tuned(
    folded: Folded, quantized: Mapping[str, QuantizedLayer], samples: DifferentiableBlock, tuner: BlockTuner
) -> dict[str, QuantizedLayer]:
    """The linears of a block, tuned; convolutions and embeddings keep their codes."""
    layers = {layer.name: layer for layer in folded.layers() if layer.kind in ("linear", "conv1d")}
    if not layers:
        return {}
    start = {name: quantized[name].tensor for name in layers}
    tuned = contract.tune(tuner, folded.block.name, layers, start, samples, folded.tensors)
    return {name: _finished(layer, tuned[name]) for name, layer in layers.items()}


def _finished(layer: Layer, tensor: QuantizedTensor) -> QuantizedLayer:
    """Return a layer with its ||W - dequantize(q)|| / ||W|| in the scaled space that q lives in; 0 for an all-zero weight."""
    scaled = dataclasses.replace(tensor, smoothing_scale=None)
    difference = total = 0.0
    for rows in affine.row_blocks(*layer.weight.shape):
        weight = layer.weight[rows]
        difference += _square_norm(scaled.rows(rows).dequantize() - weight)
        total += _square_norm(weight)
    return QuantizedLayer(layer.name, tensor, (difference / total) ** 0.5 if total else 0.0)


def _square_norm(values: Tensor) -> float:
    """Return the squared norm in float64: squares of what float32 holds over- and underflow it."""
    return float(values.double().square_().sum())
