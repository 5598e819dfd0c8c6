"""Tensors that no checkpoint need hold, since they follow from the sizes alone: sinusoidal positions, biases of zero."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def computed_tensors(module: PreTrainedModel, missing: Iterable[str]) -> dict[str, Tensor]:
    """Return the missing parameters and persistent buffers that transformers computes rather than loads, by name, in float32.

    They are what their class declares as absent from files (Marian's positions, BART's final_logits_bias) or builds as
    frozen (Pegasus's positions), and what it initialises in the same way each time.
    """
    declared = module._keys_to_ignore_on_load_missing or ()
    computed: dict[str, Tensor] = {}
    for name in missing:
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        tensor = getattr(owner, leaf)
        is_parameter = isinstance(tensor, nn.Parameter)
        frozen = is_parameter and not tensor.requires_grad
        if not frozen and not any(re.search(pattern, name) for pattern in declared):
            continue
        value = _initial(module, owner, leaf) if is_parameter else tensor
        if value is not None:
            computed[name] = value
    return computed


def _initial(module: PreTrainedModel, owner: nn.Module, leaf: str) -> Tensor | None:
    """Return the value that the model's class gives a parameter, None where that depends on what was there before, or on
    chance.
    """
    first, second = (_initialised(module, owner, leaf, before) for before in (0.0, 1.0))
    return first if torch.equal(first, second) else None


def _initialised(module: PreTrainedModel, owner: nn.Module, leaf: str, before: float) -> Tensor:
    part = copy.deepcopy(owner).to_empty(device="cpu")
    with torch.no_grad():
        parameter = part.get_parameter(leaf).fill_(before)
        module._init_weights(part)
    return parameter.detach()
