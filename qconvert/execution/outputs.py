"""The outputs of a model: what its graph gives, by name, as torch computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from qconvert.errors import InputError
from qconvert.ir.batch import Batch
from qconvert.ir.task import ENCODER, Task

# Of an encoder-decoder this is what the encoder's own graph gives.
OF_THE_ENCODER = "encoder_last_hidden_state"


def graph_outputs(task: Task, module: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """Return the tensors of `named_outputs`, in order."""
    return tuple(named_outputs(task, module, batch).values())


@torch.no_grad()
def named_outputs(task: Task, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Compute with torch what a model's graph gives for a batch, by the names of the graph's outputs.

    causal-lm: logits [rows, tokens, vocabulary]; seq2seq-lm: those of the decoder's tokens. encoder: last_hidden_state [rows,
    tokens, hidden], then what its heads give, [rows, ...] or [rows, tokens, ...]. module: every tensor that its forward
    returns.

    Raises InputError QC-INPUT-014 for a model with other outputs, which would be lost.
    """
    if not task.takes_text:
        tensors = list(tensors_in(module(**batch)))
        return {"output" if len(tensors) == 1 else f"output_{index}": tensor for index, tensor in enumerate(tensors)}
    if task is ENCODER:
        return encoder_outputs(module, module, batch)
    return _exported(task, module, module(**batch, use_cache=False, return_dict=True))


def encoder_outputs(module: nn.Module, call: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
    """Compute the `named_outputs` of an encoder that `call` runs."""
    states: list[Tensor] = []
    base = cast(nn.Module, module.base_model)
    hook = base.register_forward_hook(lambda part, args, output: states.append(output[0]))
    try:
        output = call(**batch, return_dict=True)
    finally:
        hook.remove()
    return {"last_hidden_state": states[0], **_exported(ENCODER, module, output)}


def _exported(task: Task, module: nn.Module, output: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the part of a model's outputs that its graph gives.

    What is no tensor is no output: caches, the states of all layers.
    """
    found = {name: value for name, value in output.items() if isinstance(value, Tensor) and name != OF_THE_ENCODER}
    if others := [name for name in found if name not in task.outputs]:
        raise InputError(
            "QC-INPUT-014",
            f"{type(module).__name__} gives {', '.join(others)}, which qconvert does not export",
            hint="export it with all its outputs as module:FACTORY; or, if its last hidden state is enough, save it without a "
            "head: AutoModel.from_pretrained(FOLDER).save_pretrained(OTHER)",
        )
    return {name: found[name] for name in task.outputs if name in found}


def tensors_in(result: Any) -> Iterator[Tensor]:
    """Yield all tensors in what a forward returned, in order."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from tensors_in(value)
    elif isinstance(result, tuple | list):
        for value in result:
            yield from tensors_in(value)
