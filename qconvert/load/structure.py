"""The structure of a skeleton: its repeated blocks, the inputs that it takes, and its output head."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedModel

from qconvert.ir.task import Task


def repeated_blocks(module: PreTrainedModel, task: Task) -> tuple[str, ...]:
    """Return the names of the repeated blocks, "model.layers.0", ...; of an encoder-decoder those of the encoder first.

    () where they are not passed once per hidden layer (ALBERT runs one layer many times).
    """
    if task.reads_source:  # whose config may count the layers of the one half only
        return tuple(name for half in halves(module) for name in stack_within(module, half))
    blocks = stack_within(module, "")
    return blocks if len(blocks) == getattr(module.config, "num_hidden_layers", len(blocks)) else ()


def input_names(module: PreTrainedModel, task: Task) -> tuple[str, ...]:
    """Return the tensor inputs of the forward: token types only where the model tells more than one type apart."""
    names = ("input_ids", "attention_mask")
    if task.reads_source:
        return (*names, "decoder_input_ids")
    takes_types = "token_type_ids" in inspect.signature(module.forward).parameters
    if not task.generates and takes_types and getattr(module.config, "type_vocab_size", 0) > 1:
        return (*names, "token_type_ids")
    return names


def output_head(module: PreTrainedModel, task: Task) -> str | None:
    """Return the name of a language model's head, or of the linear layer of a bare encoder's pooler; None of other models.

    Where an encoder has a head, its pooler gives no output but what the head reads.
    """
    if task.generates:
        head = module.get_output_embeddings()
        return next(str(name) for name, part in module.named_modules() if part is head)
    poolers = (name for name, part in module.named_modules() if name.split(".")[0] == "pooler" and isinstance(part, nn.Linear))
    return next(poolers, None) if module.base_model is module else None


def halves(module: PreTrainedModel) -> tuple[str, str]:
    """The module names of an encoder-decoder's encoder and decoder."""
    names = {part: name for name, part in module.named_modules()}
    return names[module.get_encoder()], names[module.get_decoder()]


def stack_within(module: PreTrainedModel, within: str) -> tuple[str, ...]:
    """Names of the elements of the outermost ModuleList that holds most parameters, () if they are of several classes."""
    lists: dict[str, nn.ModuleList] = {}
    for name, part in module.get_submodule(within).named_modules(prefix=within):
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(part, nn.ModuleList) and len(part) > 0 and not nested:
            lists[name] = part
    if not lists:
        return ()
    name, blocks = max(lists.items(), key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    if len({type(block) for block in blocks}) > 1:
        return ()
    return tuple(f"{name}.{index}" for index in range(len(blocks)))
