"""The ranges of static activations that training has settled on."""

from __future__ import annotations

from qconvert.graph.layer_inputs import layer_inputs
from qconvert.ir.activation_codes import ActivationCodes
from qconvert.ir.activation_ranges import ActivationRange, ActivationRanges
from qconvert.ir.trained import Trained
from qconvert.job import Job
from qconvert.vocabulary import TRAINED


def trained_ranges(job: Job, trained: Trained) -> ActivationRanges:
    """Return the range of every value that layers with static activations read: nothing was seen of it, but for its codes."""
    found = []
    for part, graph in job.template.graphs.items():
        values = [each for each in layer_inputs(graph.graph, job.plan.is_static_layer) if each.layers]
        for value in values:
            codes = trained.layers[value.layers[0]].input_codes
            assert codes is not None
            found.append(_range(part, str(value.root.name), value.layers, codes))
    return ActivationRanges(TRAINED, tuple(found))


def _range(part: str, name: str, layers: tuple[str, ...], codes: ActivationCodes) -> ActivationRange:
    low, high = codes.low, codes.high
    return ActivationRange(
        part=part,
        name=name,
        layers=layers,
        count=0,
        minimum=low,
        maximum=high,
        low=low,
        high=high,
        clipped=0.0,
        scale=codes.scale,
        zero_point=codes.zero_point,
        bits=codes.bits,
    )
