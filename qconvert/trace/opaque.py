"""The skeleton that is traced: one block of each kind, with every linear, convolution and embedding an opaque node."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qconvert.execution.modules import layer_kind
from qconvert.ir.model import Model, stack_of
from qconvert.ir.template import DOMAIN


class Opaque(nn.Module):
    """Stands for a module in the trace: one node of the qconvert domain that names it.

    What hangs on the module hangs on it too: its children, and the hooks that see its output (the branch of an adapter).

    shape: gives the output shape for an input. weights_read: its name, once the model has looked at the weight.
    """

    def __init__(self, kind: str, name: str, shape: Callable[[Tensor], tuple[Any, ...]], attributes: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.name, self.shape, self.attributes = kind, name, shape, attributes
        self.weights_read: set[str] = set()  # not a truth value: torch.export takes back what a trace assigns

    @property
    def weight(self) -> Tensor:
        """An empty tensor, with which any computation fails by its shape; but some models ask for its dtype (T5)."""
        self.weights_read.add(self.name)
        return torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Trace as one node of the qconvert domain, with the module's name as an attribute."""
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.kind}",
            (x,),
            attrs={"module": self.name, **self.attributes},
            dtype=torch.float32,
            shape=self.shape(x),
            version=1,
        )


def opaque(name: str, module: nn.Module) -> Opaque | None:
    """Return the stand-in for a linear, Conv1D, Conv2d or embedding; None for anything that computes something else.

    A subclass with a forward of its own (a scaled embedding, say) is traced as it is: only the forward that we know is
    replaced. The same goes for convolutions that pad with anything but zeros.
    """
    stand_in = _stand_in(name, module)
    if stand_in is not None:
        for child, part in module.named_children():
            stand_in.add_module(child, part)
        for hook in module._forward_hooks.values():
            stand_in.register_forward_hook(hook)
    return stand_in


def _stand_in(name: str, module: nn.Module) -> Opaque | None:
    kind = layer_kind(module)
    match module:
        case nn.Linear() | Conv1D() if kind:
            out = module.nf if isinstance(module, Conv1D) else module.out_features
            return Opaque("Linear", name, lambda x: (*x.shape[:-1], out), {"kind": kind})
        case nn.Embedding() if kind:
            dim = module.embedding_dim
            return Opaque("Embedding", name, lambda x: (*x.shape, dim), {})
        case nn.Conv2d() if kind:
            return _opaque_conv(name, module)
    return None


def _opaque_conv(name: str, conv: nn.Conv2d) -> Opaque:
    padding = [int(p) for p in conv.padding]

    def shape(x: Tensor) -> tuple[Any, ...]:
        spatial = [
            (x.shape[2 + i] + 2 * padding[i] - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1
            for i in range(2)
        ]
        return (x.shape[0], conv.out_channels, *spatial)

    return Opaque(
        "Conv",
        name,
        shape,
        {
            "strides": list(conv.stride),
            "pads": padding * 2,
            "dilations": list(conv.dilation),
            "group": conv.groups,
            "kernel_shape": list(conv.kernel_size),
        },
    )


def kind_of(block: nn.Module) -> tuple[Any, ...]:
    """Return what makes two blocks the same computation: classes, plain attributes and parameter shapes, all but an index."""
    parts: list[Any] = []
    for name, module in block.named_modules():
        attributes = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and key not in ("layer_idx", "training")
        }
        parts.append((name, type(module).__qualname__, tuple(sorted(attributes.items()))))
    parts.extend((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return tuple(parts)


def representatives(model: Model) -> dict[str, str]:
    """Return the first block of the same kind in its stack, for every block."""
    first: dict[tuple[Any, ...], str] = {}
    return {name: first.setdefault((stack_of(name), kind_of(model.module.get_submodule(name))), name) for name in model.blocks}


def shortened(model: Model, blocks: list[str]) -> nn.Module:
    """Return a copy of the skeleton that keeps only `blocks`, under their old names in `Opaque` and in `layer_idx`."""
    module = copy.deepcopy(model.module)
    for stack, kept in groupby(blocks, stack_of):
        _shorten(module, stack, [int(name.rpartition(".")[2]) for name in kept])
    return module


def _shorten(module: nn.Module, stack: str, kept: list[int]) -> None:
    """Cut one list of blocks, and the lists with one entry per block (layer_types) in the config that belongs to it."""
    layers = module.get_submodule(stack)
    assert isinstance(layers, nn.ModuleList)
    owner = stack
    while owner and not hasattr(module.get_submodule(owner), "config"):
        owner = owner.rpartition(".")[0]
    config = getattr(module.get_submodule(owner), "config", None)
    if config is not None:
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == len(layers):
                setattr(config, key, [value[i] for i in kept])
        config.num_hidden_layers = len(kept)
    module.set_submodule(stack, nn.ModuleList([layers[i] for i in kept]))


def places(blocks: list[str]) -> dict[str, str]:
    """Return which block each name of the shortened model stands for."""
    return {f"{stack}.{position}": block for stack, kept in groupby(blocks, stack_of) for position, block in enumerate(kept)}


def original_name(name: str, blocks: list[str]) -> str:
    """Return the full model's name of a module or parameter of the shortened one."""
    for place, block in places(blocks).items():
        if name == place or name.startswith(place + "."):
            return block + name[len(place) :]
    return name
