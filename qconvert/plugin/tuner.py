"""The BlockTuner contract: one algorithm that changes all tensors of a block for the sake of the block's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol

from torch import Tensor

from qconvert.ir.layer import Layer
from qconvert.ir.quantized import QuantizedTensor

# Takes the number of a batch and the weights [out, in] of some layers by name, and gives the block's output.
Forward = Callable[[int, Mapping[str, Tensor]], Tensor]


class SampledBlock(Protocol):
    """A repeated block on its calibration samples. Batches are numbered from 0."""

    @property
    def targets(self) -> Sequence[Tensor]:
        """What the float block puts out, per batch [rows, tokens, hidden]."""

    @property
    def importance(self) -> Sequence[Tensor]:
        """How much a squared error counts at each token, per batch [rows, tokens]; 0 at padding."""

    def running(self, fixed: Mapping[str, Tensor]) -> AbstractContextManager[Forward]:
        """Hold the block ready to be run, within the context, with other weights; gradients flow to those.

        Layers whose weight is not given compute with the float one. Activations are float, also where a scheme has int8 ones.

        fixed: tensors that differ from the source, by full name.
        """


class BlockTuner(ABC):
    """Brings the output of one quantized block closer to that of the float block.

    Subclasses are frozen dataclasses: their fields are the user's options, with types, defaults and docs.
    A tuner changes none of its inputs, and the same inputs give the same bytes.

    name: what the user types, kebab-case.
    """

    name: ClassVar[str]

    @abstractmethod
    def tune(
        self,
        layers: Mapping[str, Layer],
        tensors: Mapping[str, QuantizedTensor],
        samples: SampledBlock,
        fixed: Mapping[str, Tensor],
    ) -> Mapping[str, QuantizedTensor]:
        """Choose codes, scales and zero points for all linears of a block.

        layers: by name, with weights as the quantizer was given them.
        tensors: by name, what the quantizer made of them.
        fixed: tensors of the block that differ from the source, because a smoothing scale was folded into them: for `running`.

        Returns a tensor for each name of `tensors`, that one itself where it is best left alone. Schemes, shapes, smoothing
        scales and outliers stay what they are.
        """
