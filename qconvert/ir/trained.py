"""Trained: the codes that quantization-aware training has settled on, which a conversion takes as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from qconvert.ir.activation_codes import ActivationCodes
from qconvert.ir.model import TensorInfo, TensorSource
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme


@dataclass(frozen=True, slots=True)
class TrainedLayer:
    """A layer that was trained with codes.

    input_codes: of what it reads, in ranges that training has found; None where its scheme has none.
    """

    scheme: QuantScheme
    input_codes: ActivationCodes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What training has made of a model.

    layers: by module name, all that were trained with codes.
    codes: gives the quantized weight of one of them.
    source: all trained tensors under the model's own names; the weights of layers are what their codes stand for.
    """

    layers: Mapping[str, TrainedLayer]
    codes: Callable[[str], QuantizedTensor]
    source: TensorSource


@dataclass(frozen=True, slots=True, eq=False)
class TrainedSource:
    """The tensors of a model with those in their place that were trained. A TensorSource."""

    before: TensorSource
    trained: TensorSource
    tensors: Mapping[str, TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", {**self.before.tensors, **self.trained.tensors})

    def read(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype."""
        return (self.trained if name in self.trained.tensors else self.before).read(name)
