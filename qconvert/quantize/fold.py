"""Put smoothing scales into the weights around them, where that changes nothing.

A linear that reads x / s instead of x needs somebody to divide: the norm or linear that produces x does, in its weights,
and the compressed-tensors layout needs no place for s. Whether the block still computes the same is checked by running
it. What does not fold is not scaled, or stays a smoothing scale where the layout has a place for it.
"""

from __future__ import annotations

import dataclasses
import logging

from torch import Tensor

from qconvert.execution.unit import relative_change
from qconvert.ir.layer import Block
from qconvert.job import Job
from qconvert.plugin.host import contract
from qconvert.quantize.folded import Folded

logger = logging.getLogger("qconvert")

# Largest change of a block's output, relative to its largest value, that float32 rounding explains in one fold.
TOLERANCE = 1e-4


def fold(block: Block, job: Job) -> Folded:
    """Ask the quantizer for smoothing scales and put them into the block.

    Scales that can't be folded stay as smoothing scales where the job keeps them; else the block does without.
    """
    quantizer, keep_unfolded = job.quantizer, job.keeps_unfolded
    wanted: dict[int, Tensor] = {}
    for index, group in enumerate(block.groups):
        # A convolution reads each input channel through a whole kernel: no factor on the input stands for a scale per column.
        # An embedding reads no channels at all.
        if group.producer is None and not (keep_unfolded and group.layers[0].kind not in ("conv2d", "embedding")):
            continue
        schemes = tuple(job.plan.layers[layer.name].scheme for layer in group.layers)
        scale = contract.prepare(quantizer, group.in_float(), schemes).smoothing_scale
        if scale is not None:
            wanted[index] = scale
    folded = _that_change_nothing(
        Folded(block, {index: scale for index, scale in wanted.items() if block.groups[index].producer}), job
    )
    kept = {index: scale for index, scale in wanted.items() if index not in folded.scales} if keep_unfolded else {}
    return dataclasses.replace(folded, kept=kept, observers=quantizer.observers)


def _that_change_nothing(candidates: Folded, job: Job) -> Folded:
    """The candidates whose folding leaves the block's output as it is: tried all at once, then one by one."""
    block, scales = candidates.block, candidates.scales
    lane = block.lane
    if not scales or lane is None:
        return Folded(block, {})

    def change(folded: Folded) -> float:
        return relative_change(job.model, block.name, lane, folded.parameters(), job.recipe.device)

    if change(candidates) <= TOLERANCE * len(scales):  # each of them rounds
        return candidates
    passed: dict[int, Tensor] = {}
    for index, scale in scales.items():
        error = change(Folded(block, {index: scale}))
        if error <= TOLERANCE:
            passed[index] = scale
        else:
            names = ", ".join(layer.name for layer in block.groups[index].layers)
            logger.debug("the smoothing scale of %s does not fold: the block's output moves by %.1e", names, error)
    return Folded(block, passed)
