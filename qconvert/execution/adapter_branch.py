"""The branch that a LoRA adapter puts beside a layer: y = layer(x) + lora_B(lora_A(x))."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

# The two linears of a branch, as peft calls them: they are children of their layer.
DOWN, UP = "lora_A", "lora_B"


class AdapterBranch:
    """A forward hook of a layer that adds what the layer's own lora_A and lora_B make of its input."""

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the output of the layer with its branch added."""
        down, up = layer.get_submodule(DOWN), layer.get_submodule(UP)
        return cast(Tensor, output + up(down(args[0])))


def add_branch(layer: nn.Module, rank: int, shape: tuple[int, int]) -> list[str]:
    """Put a branch without weights (they are on the meta device) beside a layer, and return its children's names.

    shape: [out, in] of the layer.
    """
    out, width = shape
    for name, linear in ((DOWN, _linear(width, rank)), (UP, _linear(rank, out))):
        layer.add_module(name, linear)
    layer.register_forward_hook(AdapterBranch())
    return [DOWN, UP]


def _linear(width: int, out: int) -> nn.Linear:
    return nn.Linear(width, out, bias=False, device="meta").requires_grad_(False).eval()
