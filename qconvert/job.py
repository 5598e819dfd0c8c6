"""Job: a recipe, and all that is known before the weights are read. It is what the stages take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.samples import Samples
from qconvert.ir.template import Template
from qconvert.plugin.host.distribution import Code
from qconvert.plugin.quantizer import Quantizer
from qconvert.plugin.range_estimator import RangeEstimator
from qconvert.plugin.tuner import BlockTuner
from qconvert.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Job:
    """One conversion of one model.

    asked: the recipe as it was given; `recipe` is what a budget made of it.
    digests: name -> sha256 of the files of the model and of the data; {} where nothing is to be written.
    code: what the tensors are made by, for the manifest.
    tuner: what changes the tensors of each block once they are quantized; None where nothing does.
    range_estimator: what chooses the ranges of activations with scales from calibration; None where
        no layer has such, or training has found them.
    """

    asked: Recipe
    recipe: Recipe
    quantizer: Quantizer
    model: Model
    template: Template
    plan: Plan
    samples: Samples
    digests: Mapping[str, str] = field(default_factory=dict)
    code: Sequence[Code] = ()
    tuner: BlockTuner | None = None
    range_estimator: RangeEstimator | None = None

    @property
    def keeps_unfolded(self) -> bool:
        """Whether smoothing scales that no producer takes stay in the graph: the layout has a place for them then.

        Not with static activations: the range of a value is that of what the layer before puts out.
        """
        return self.recipe.layout == "onnx" and not self.plan.is_static
