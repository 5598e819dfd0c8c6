"""The layers of a module that is trained with codes: each is what it was, and computes with codes of weight and input.

They are still nn.Linear, nn.Conv2d, nn.Embedding and Conv1D, with the same parameters under the same names, so that optimizers,
Trainers and peft find what they look for.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from qconvert.execution.modules import as_matrix, in_own_shape, layer_kind
from qconvert.ir.scheme import QuantScheme
from qconvert.training.weights import WeightQuantizer


class FakeQuantized:
    """What such layers have in common.

    weight_quantizer: of the weight; a head that shares the weight of an embedding shares it.
    input_quantizer: StaticInput or RowInput; nn.Identity where the input stays float.
    """

    weight_quantizer: WeightQuantizer
    input_quantizer: nn.Module

    @property
    def scheme(self) -> QuantScheme:
        """The scheme that it is trained with."""
        return self.weight_quantizer.scheme

    def _fake_weight(self, module: nn.Module) -> Tensor:
        return in_own_shape(module, self.weight_quantizer(as_matrix(module)))


class QATLinear(FakeQuantized, nn.Linear):
    """A linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., out] for [..., in]."""
        return functional.linear(self.input_quantizer(input), self._fake_weight(self), self.bias)


class QATConv1D(FakeQuantized, Conv1D):  # type: ignore[misc]
    """GPT-2's linear layer, whose weight is [in, out]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] for [..., in]."""
        return functional.linear(self.input_quantizer(x), self._fake_weight(self).T, self.bias)


class QATConv2d(FakeQuantized, nn.Conv2d):
    """A convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [rows, out, height, width] for [rows, in, height, width]."""
        output: Tensor = self._conv_forward(self.input_quantizer(input), self._fake_weight(self), self.bias)
        return output


class QATEmbedding(FakeQuantized, nn.Embedding):
    """An embedding."""

    def forward(self, input: Tensor) -> Tensor:
        """Return rows of the dequantized weight."""
        weight = self._fake_weight(self)
        return functional.embedding(input, weight, self.padding_idx)


KINDS = {"linear": QATLinear, "conv1d": QATConv1D, "conv2d": QATConv2d, "embedding": QATEmbedding}


def become_fake_quantized(module: nn.Module, weight_quantizer: WeightQuantizer, input_quantizer: nn.Module) -> None:
    """Make a layer fake-quantized, in place: whoever holds it goes on holding it, hooks and parameters stay."""
    kind = layer_kind(module)
    assert kind is not None
    module.__class__ = KINDS[kind]
    module.weight_quantizer, module.input_quantizer = weight_quantizer, input_quantizer
