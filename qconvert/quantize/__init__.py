"""Quantize: each block's layers through the quantizer, checked before anyone else sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch import Tensor

from qconvert.execution.trial_weights import TrialWeights
from qconvert.execution.unit import DifferentiableBlock
from qconvert.execution.wide_rows import is_large, tiles
from qconvert.ir.finite import require_finite
from qconvert.ir.layer import Block, Layer
from qconvert.ir.progress import Progress
from qconvert.ir.quantized import QuantizedBlock, QuantizedLayer, QuantizedTensor, stacked
from qconvert.ir.scheme import QuantScheme
from qconvert.job import Job
from qconvert.plugin.host import contract
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.plugin.tuner import BlockTuner
from qconvert.quantize.fold import fold
from qconvert.quantize.folded import ALL, Folded, FoldedLayer
from qconvert.quantize.measured import Measured


def quantize(block: Block, job: Job) -> QuantizedBlock:
    """Quantize the layers of a block, its smoothing scales folded where they can be, and tune them where the job says so.

    Raises UsageError QC-CALIB-001 for layers whose input was never seen, InputError QC-WEIGHT-001 for weights that are not
    finite; PluginError for a quantizer or a tuner that breaks its contract.
    """
    return _in_codes(_folded(block, job), job)


def on_trial(blocks: Iterable[Block], job: Job, progress: Progress) -> TrialWeights:
    """Quantize all blocks and write nothing. Raises what `quantize` raises."""
    tensors: dict[str, QuantizedTensor] = {}
    floats: dict[str, Tensor] = {}
    for block in blocks:
        folded = _folded(block, job)
        tensors |= {layer.name: layer.tensor for layer in _in_codes(folded, job).layers}
        floats |= {name: value if isinstance(value, Tensor) else value[ALL] for name, value in folded.parameters().items()}
        progress.advance()
    return TrialWeights(job.model, job.plan, tensors, floats)


def _folded(block: Block, job: Job) -> Folded:
    block.require_seen()
    for layer in block.layers:
        require_finite(f"{layer.name}.weight", layer.weight)
    return fold(block, job)


def _in_codes(folded: Folded, job: Job) -> QuantizedBlock:
    block = folded.block
    layers: dict[str, QuantizedLayer] = {}
    for member in folded.members():
        name = member.stored.name
        quantized = _quantized(member, job.plan.layers[name].scheme, job.quantizer, outside=not block.name)
        if name in folded.smoothing_scales:
            tensor = dataclasses.replace(quantized.tensor, smoothing_scale=folded.smoothing_scales[name])
            quantized = dataclasses.replace(quantized, tensor=tensor)
        layers[name] = quantized
    if block.samples is not None and job.tuner is not None:
        samples = DifferentiableBlock(job.model, block.name, block.samples, job.recipe.device)
        layers |= _tuned(folded, layers, samples, job.tuner)
    return QuantizedBlock(block.name, tuple(layers.values()), folded.tensors)


def _quantized(layer: FoldedLayer, scheme: QuantScheme, quantizer: Quantizer, *, outside: bool) -> QuantizedLayer:
    """Quantize one layer; a large one outside the blocks some rows at a time, if each row is quantized by itself."""
    shape, measured = layer.stored.weight.shape, Measured(layer.stored.weight.shape)
    nearest = layer.stored.kind == "embedding" and bool(quantizer.observers)  # it has no input to weigh its errors by

    def quantized(rows: slice) -> QuantizedTensor:
        part = layer.in_float(rows)
        tensor = round_to_nearest(part.weight, scheme) if nearest else contract.quantize(quantizer, part, scheme)
        measured.add(part, tensor)
        return tensor

    by_rows = (nearest or quantizer.by_rows) and not scheme.joins_rows
    in_tiles = outside and by_rows and is_large(shape)
    tensor = stacked(map(quantized, tiles(shape)), shape[0]) if in_tiles else quantized(ALL)
    return measured.layer(layer.stored.name, tensor)


def _tuned(
    folded: Folded, quantized: Mapping[str, QuantizedLayer], samples: DifferentiableBlock, tuner: BlockTuner
) -> dict[str, QuantizedLayer]:
    """The linears of a block, tuned; convolutions and embeddings keep their codes."""
    layers = {layer.name: layer for layer in folded.layers() if layer.kind in ("linear", "conv1d")}
    if not layers:
        return {}
    start = {name: quantized[name].tensor for name in layers}
    tuned = contract.tune(tuner, folded.block.name, layers, start, samples, folded.tensors)
    return {name: _measured(layer, tuned[name]) for name, layer in layers.items()}


def _measured(layer: Layer, tensor: QuantizedTensor) -> QuantizedLayer:
    measured = Measured(layer.weight.shape)
    measured.add(layer, tensor)
    return measured.layer(layer.name, tensor)
