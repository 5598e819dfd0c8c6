"""Modules of torch and transformers as layers: of which kind they are, and how their weights lie."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qconvert.ir.layer import LayerKind


def layer_kind(module: nn.Module) -> LayerKind | None:
    """Return the kind of layer that a module is; None for a module that is traced as it is, and never quantized.

    Only a forward that we know, on a weight of the module's own, is a layer: a subclass may compute something else, a
    parametrized weight is computed at every call, and nn.MultiheadAttention reads out_proj's weight without calling it.
    """
    if "weight" not in module._parameters or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    match module:
        case nn.Linear() if type(module).forward is nn.Linear.forward:
            return "linear"
        case Conv1D():
            return "conv1d"
        case nn.Conv2d() if type(module).forward is nn.Conv2d.forward:
            return "conv2d" if module.padding_mode == "zeros" and not isinstance(module.padding, str) else None
        case nn.Embedding() if type(module).forward is nn.Embedding.forward and module.max_norm is None:
            return "embedding"
    return None


def as_matrix(module: nn.Module) -> Tensor:
    """Return the weight of a layer as [out, in], whatever its kind: Conv1D transposed, kernels flattened."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight.flatten(1)


def in_own_shape(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a layer's weight [out, in] in the shape of the module's parameter: Conv1D [in, out], kernels not flattened."""
    match module:
        case Conv1D():
            return weight.T
        case nn.Conv2d():
            return weight.reshape(module.weight.shape)
    return weight
