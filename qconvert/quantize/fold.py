"""Put smoothing scales into the weights around them, where that changes nothing.

A linear that reads x / s instead of x needs somebody to divide: the norm or linear that produces x does, in its weights,
and the compressed-tensors layout needs no place for s. Whether the block still computes the same is checked by running
it. What does not fold is not scaled, or stays a smoothing scale where the layout has a place for it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qconvert.execution.unit import relative_change
from qconvert.ir.layer import Block, Producer
from qconvert.job import Job
from qconvert.plugin.host import contract
from qconvert.plugin.smoothing import divided, scaled

logger = logging.getLogger("qconvert")

# Largest change of a block's output, relative to its largest value, that float32 rounding explains in one fold.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Folded:
    """A block whose scales were folded.

    block: with scaled weights and statistics. tensors: float tensors that changed. smoothing_scales: those that did not fold.
    """

    block: Block
    tensors: Mapping[str, Tensor]
    smoothing_scales: Mapping[str, Tensor]


def fold(block: Block, job: Job) -> Folded:
    """Ask the quantizer for smoothing scales and put them into the block.

    Scales that can't be folded stay as smoothing scales where the job keeps them; else the block does without.
    """
    quantizer, keep_unfolded = job.quantizer, job.keeps_unfolded
    wanted = {}
    for index, group in enumerate(block.groups):
        # A convolution reads each input channel through a whole kernel: no factor on the input stands for a scale per column.
        # An embedding reads no channels at all.
        if group.producer is None and not (keep_unfolded and group.layers[0].kind not in ("conv2d", "embedding")):
            continue
        prepared = contract.prepare(quantizer, group, tuple(job.plan.layers[layer.name].scheme for layer in group.layers))
        if prepared.smoothing_scale is not None:
            wanted[index] = prepared.smoothing_scale
    foldable = _that_change_nothing(block, job, [index for index in wanted if block.groups[index].producer], wanted)
    folded = _apply(block, {index: wanted[index] for index in foldable})
    kept = {index: scale for index, scale in wanted.items() if index not in foldable} if keep_unfolded else {}
    smoothing_scales = {layer.name: scale for index, scale in kept.items() for layer in block.groups[index].layers}
    groups = list(folded.block.groups)
    for index, scale in kept.items():
        groups[index] = scaled(groups[index], scale, quantizer.observers)
    for index in foldable:
        groups[index] = dataclasses.replace(
            groups[index],
            layers=tuple(
                dataclasses.replace(layer, stats=divided(layer.stats, wanted[index], quantizer.observers))
                for layer in groups[index].layers
            ),
        )
    return Folded(dataclasses.replace(folded.block, groups=tuple(groups)), folded.tensors, smoothing_scales)


def _that_change_nothing(block: Block, job: Job, candidates: Sequence[int], scales: Mapping[int, Tensor]) -> list[int]:
    """The candidates whose folding leaves the block's output as it is: tried all at once, then one by one."""
    lane = block.lane
    if not candidates or lane is None:
        return []

    def change(indices: Sequence[int]) -> float:
        applied = _apply(block, {index: scales[index] for index in indices})
        replaced = _parameters(applied.block, indices, applied.tensors)
        return relative_change(job.model, block.name, lane, replaced, job.recipe.device)

    if change(candidates) <= TOLERANCE * len(candidates):  # each of them rounds
        return list(candidates)
    passed = []
    for index in candidates:
        error = change([index])
        if error <= TOLERANCE:
            passed.append(index)
        else:
            names = ", ".join(layer.name for layer in block.groups[index].layers)
            logger.debug("the smoothing scale of %s does not fold: the block's output moves by %.1e", names, error)
    return passed


def _apply(block: Block, scales: Mapping[int, Tensor]) -> Folded:
    """Multiply the weights of the groups by their scales and divide the producers."""
    weights = {layer.name: layer.weight for layer in block.layers}
    biases = {layer.name: layer.bias for layer in block.layers}
    tensors: dict[str, Tensor] = {}
    for index, scale in scales.items():
        group = block.groups[index]
        assert group.producer is not None
        for layer in group.layers:
            weights[layer.name] = weights[layer.name] * scale
        name = group.producer.name
        factor = _producer_scale(group.producer, scale)
        if name in weights:
            weights[name] = weights[name] / factor[:, None]
            bias = biases[name]
            if bias is not None:
                biases[name] = tensors[f"{name}.bias"] = bias / factor
            continue
        for suffix in ("weight", "bias"):
            full = f"{name}.{suffix}"
            if full in block.tensors:
                old = tensors.get(full, block.tensors[full])
                tensors[full] = old / (factor[:, None] if old.ndim == 2 else factor)
    groups = tuple(
        dataclasses.replace(
            group,
            layers=tuple(
                dataclasses.replace(layer, weight=weights[layer.name], bias=biases[layer.name]) for layer in group.layers
            ),
        )
        for group in block.groups
    )
    return Folded(dataclasses.replace(block, groups=groups), tensors, {})


def _producer_scale(producer: Producer, scale: Tensor) -> Tensor:
    """Scale per producer channel; inputs that are copies of one channel were given one scale."""
    if producer.channels is None:
        return scale
    channels = torch.tensor(producer.channels)
    return torch.ones(int(channels.max()) + 1).scatter(0, channels, scale)


def _parameters(block: Block, indices: Sequence[int], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter that folding `indices` changes, in the module's own shape."""
    names = {layer.name for index in indices for layer in block.groups[index].layers}
    names |= {producer.name for index in indices if (producer := block.groups[index].producer) is not None}
    changed = dict(tensors)
    for layer in block.layers:
        if layer.name in names:
            changed[f"{layer.name}.weight"] = layer.weight.T if layer.kind == "conv1d" else layer.weight
    return changed
