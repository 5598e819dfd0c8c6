"""The sensitivity of every layer: what it would cost and lose in every scheme.

The loss at one scheme is measured, with the weights that the quantizer makes of it: how far they are from plain rounding
differs between layers by a factor of five. The other schemes then follow, because what they lose more or less is nearly the
same everywhere (measured on SmolLM2: int4-g64 1.25 to 1.45 of int4-g32): in proportion to the error of plain rounding,
with each input column weighted by its energy, on a sample of the output channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.allocate.choices import Choice, cost
from qconvert.allocate.knapsack import Option
from qconvert.allocate.wavefront import Wavefront
from qconvert.execution.modules import in_own_shape
from qconvert.ir import affine
from qconvert.ir.batch import Batch
from qconvert.ir.finite import require_finite
from qconvert.ir.layer import Block, Layer, LinearGroup
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.progress import Progress
from qconvert.ir.scheme import QuantScheme
from qconvert.job import Job
from qconvert.plugin.host import contract
from qconvert.plugin.observer import Gram
from qconvert.plugin.smoothing import scaled

# Of the samples on which losses are measured. Twice as many found assignments 2 % better (SmolLM2, 4.5 bits).
ROWS, TOKENS = 4, 64
# See _typical.
TYPICAL = 2
# Output channels of a layer on which schemes are compared.
SAMPLED_CHANNELS = 128


@dataclass(frozen=True, slots=True)
class Weighed:
    """A choice with what each of its schemes costs and loses. options: one per scheme of the choice."""

    choice: Choice
    options: tuple[Option, ...]


def measure_losses(blocks: Iterable[Block], job: Job, waiting: Sequence[Choice], progress: Progress) -> list[Weighed]:
    """Measure what each scheme costs and loses at every choice, in the order of the blocks."""
    model, plan = job.model, job.plan
    choice_of = {name: choice for choice in waiting for name in choice.layers}
    wavefront = Wavefront(model, _few(model, job.samples.calibration), job.recipe.device)
    costs, errors, found = [], [], []
    for block in blocks:
        block.require_seen()
        wavefront.enter(block.name)
        for group in block.groups:
            for layer in group.layers:
                require_finite(f"{layer.name}.weight", layer.weight)
            asked = {layer.name: choice_of.get(layer.name) for layer in group.layers}
            if not any(asked.values()):
                continue
            made = _ReferenceLayers(group.in_float(), job, choice_of)
            for choice in dict.fromkeys(filter(None, asked.values())):
                wavefront.add(made.parameters(model, choice))
                found.append(choice)
                costs.append([made.cost(plan, choice, scheme) for scheme in choice.schemes])
                errors.append([made.rounding_error(choice, scheme) for scheme in choice.schemes])
        progress.advance()
    weighed = []
    for choice, loss, cost_of, error in zip(found, _typical(wavefront.losses()), costs, errors, strict=True):
        measured = error[choice.schemes.index(choice.reference)]
        losses = [loss * each / measured if measured else 0.0 for each in error]
        weighed.append(Weighed(choice, tuple(map(Option, cost_of, losses))))
    return weighed


def _typical(losses: Tensor) -> list[float]:
    """Mean over the tokens of [variants, tokens], without letting a few of them decide.

    Some tokens are on the edge: whatever is quantized, early layers above all, tips them over, and they lose hundreds of
    times what others do (one of 512 had 30 % of all losses on SmolLM2). So they would with any scheme. Each counts for no
    more than TYPICAL times what a token in the middle loses over all variants.
    """
    total = losses.sum(0)
    weight = (TYPICAL * total.median() / total.clamp(min=torch.finfo(total.dtype).tiny)).clamp(max=1)
    return [float(value) for value in (losses * weight).mean(1)]


def _few(model: Model, batches: Sequence[Batch]) -> Batch:
    """The first samples of the first batch, cut off where they are long."""
    if not model.task.takes_text:
        return model.take_rows(batches[0], slice(ROWS * TOKENS))
    return {name: value[:ROWS, :TOKENS] for name, value in batches[0].items()}


class _ReferenceLayers:
    """Layers that share an input, quantized to the reference schemes of their choices.

    Where a smoothing scale does not fold into a producer, the graph keeps a tensor for it.
    """

    def __init__(self, group: LinearGroup, job: Job, choice_of: Mapping[str, Choice]) -> None:
        plan, quantizer = job.plan, job.quantizer
        names = [layer.name for layer in group.layers]
        schemes = tuple(choice_of[name].reference if name in choice_of else plan.layers[name].scheme for name in names)
        kept = job.keeps_unfolded and group.producer is None and group.layers[0].kind != "conv2d"
        scale = contract.prepare(quantizer, group, schemes).smoothing_scale if kept or group.producer is not None else None
        if scale is not None:
            group = scaled(group, scale, quantizer.observers)
        self.layers = {layer.name: layer for layer in group.layers}
        self.weights = {
            layer.name: contract.quantize(quantizer, layer, scheme).dequantize() / (1 if scale is None else scale)
            for layer, scheme in zip(group.layers, schemes, strict=True)
        }
        # Whether there is a scale may depend on the scheme: room for it is left in any case.
        self.scale_bytes = torch.float32.itemsize * group.layers[0].weight.shape[1] if kept else 0

    def parameters(self, model: Model, choice: Choice) -> dict[str, Tensor]:
        """Full name -> the quantized weight in the shape of the module's own."""
        return {f"{name}.weight": in_own_shape(model.module.get_submodule(name), self.weights[name]) for name in choice.layers}

    def cost(self, plan: Plan, choice: Choice, scheme: QuantScheme) -> int:
        """Bytes on disk."""
        return sum(
            cost(dataclasses.replace(plan.layers[name], scheme=scheme), self.layers[name].weight) + self.scale_bytes
            for name in choice.layers
        )

    def rounding_error(self, choice: Choice, scheme: QuantScheme) -> float:
        return sum(_rounding_error(self.layers[name], scheme) for name in choice.layers)


def _rounding_error(layer: Layer, scheme: QuantScheme) -> float:
    """Sum of energy * (w - dequantize(q))^2, the output error if input columns were not correlated, over some of the rows."""
    weight = layer.weight[:: max(1, len(layer.weight) // SAMPLED_CHANNELS)].contiguous()
    difference = affine.rounded(weight, scheme).sub_(weight).square_()
    if layer.stats is not None and Gram.name in layer.stats.values:
        difference *= layer.stats.values[Gram.name].diagonal().clamp(min=0)
    return float(difference.sum(dtype=torch.float64)) * len(layer.weight) / len(weight)
