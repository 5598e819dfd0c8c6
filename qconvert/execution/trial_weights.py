"""The weights of a model on trial: layers in codes or in float, as one likes, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from qconvert.execution.modules import in_own_shape
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.quantized import QuantizedTensor


@dataclass(frozen=True, eq=False)
class TrialWeights:
    """What a quantizer made of a model.

    tensors: planned layer -> its codes.
    floats: the parameters that a smoothing scale was folded into, in float, by full name. With all of them the model computes
        what it did, so that a layer which is read in float has its weight from here.
    """

    model: Model
    plan: Plan
    tensors: Mapping[str, QuantizedTensor]
    floats: Mapping[str, Tensor]

    def reader(self, in_float: Callable[[str], bool]) -> Callable[[str], Tensor]:
        """Return what gives a parameter in the module's shape. in_float: whether a planned layer is read in float."""

        def read(parameter: str) -> Tensor:
            stored = self.model.stored_name(parameter)
            layer = self.plan.layer_of(stored.removesuffix(".weight")) if stored.endswith(".weight") else None
            if layer is not None and not in_float(layer.name):
                return in_own_shape(self.model.module.get_submodule(layer.name), self.tensors[layer.name].dequantize())
            return self.floats[stored] if stored in self.floats else self.model.read(parameter)

        return read
