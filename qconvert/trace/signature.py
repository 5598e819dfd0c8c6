"""The inputs and outputs of a graph, per task: the module that the exporter sees, example inputs, names.

Encoder-decoders, which are two graphs, are in encoder_decoder.py.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qconvert.execution.outputs import encoder_outputs, tensors_in
from qconvert.execution.probes import first_position
from qconvert.ir.model import Model
from qconvert.ir.task import CAUSAL_LM, ENCODER, MODULE, SEQ2SEQ_LM, Task
from qconvert.trace import attention
from qconvert.trace.attention import NoCache, attention_context, rotary_caches, rotation_left_to_attention
from qconvert.trace.padding import TokensFirst

# Batch and sequence of the example inputs: torch.export specialises dimensions of size 0 and 1. All are different, and none
# is what traces are checked with (ort/compare.py).
BATCH, SEQUENCE, PAST = 7, 3, 5


@dataclass(frozen=True)
class Form:
    """One way to trace a task, from the fastest to the safest.

    fused: attention as one ONNX Runtime op. rotary: that op rotates queries and keys too.
    """

    fused: bool
    rotary: bool = False

    def __str__(self) -> str:
        if not self.fused:
            return "with attention in plain operators"
        return f"with attention as one operator{' that rotates' if self.rotary else ''}"


# Per task the ways to trace it, in the order in which they are tried, and the attention that emits ONNX Runtime's op.
FORMS: dict[Task, tuple[Form, ...]] = {
    CAUSAL_LM: (Form(fused=True, rotary=True), Form(fused=True)),
    SEQ2SEQ_LM: (Form(fused=True),),
    ENCODER: (Form(fused=True), Form(fused=False)),
    MODULE: (Form(fused=False),),
}
FUSED = {CAUSAL_LM: attention.DECODER, SEQ2SEQ_LM: attention.ENCODER_DECODER, ENCODER: attention.ENCODER}


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one graph, and the module that is traced for it.

    wrapper: takes `arguments` and the parameters, by name. shapes: the dynamic dimensions of the arguments, as torch.export
        wants them. inputs, outputs: names in the graph, in the order of the wrapper's tensors.
    """

    wrapper: nn.Module
    arguments: dict[str, Any]
    shapes: dict[str, Any]
    inputs: list[str]
    outputs: list[str]


def signature(model: Model, module: nn.Module, blocks: list[str], form: Form, outputs: list[str]) -> Signature:
    """Of the one graph of a model. module: the shortened skeleton with `blocks` only; outputs: names of what it gives."""
    return SIGNATURES[model.task](model, module, blocks, form, outputs)


class Wrapper(nn.Module):
    """Gives the model the inputs and outputs of the graph. Parameters come in as inputs, so that nothing is folded into
    them and equal ones are not merged: stamping replaces them per block."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__()
        self.module, self.form = module, form

    def call(self, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run the model with these parameters in the place of its own."""
        return torch.func.functional_call(self.module, parameters, args, kwargs)


def layer_indices(blocks: list[str]) -> list[int]:
    """Return the position of each block in its stack, from its name."""
    return [int(name.rpartition(".")[2]) for name in blocks]


def cache_names(prefix: str, indices: list[int]) -> list[str]:
    """Return the names of keys and values in a graph, those of one block together."""
    return [f"{prefix}.{index}.{part}" for index in indices for part in ("key", "value")]


class _CausalLM(Wrapper):
    def __init__(self, module: nn.Module, form: Form, indices: list[int], first: int) -> None:
        """first: the position of a row's first token."""
        super().__init__(module, form)
        self.indices, self.first = indices, first
        if form.rotary:
            positions = int(module.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
            cos, sin = rotary_caches(module, positions)
            self.register_buffer("cos_cache", cos)
            self.register_buffer("sin_cache", sin)

    def forward(
        self, inputs: dict[str, Tensor], past: list[tuple[Tensor, Tensor]], parameters: dict[str, Tensor]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        total, sequence = attention_mask.shape[1], input_ids.shape[1]
        with attention_context() as context, contextlib.ExitStack() as stack:
            context.past = dict(zip(self.indices, past, strict=True))
            order = TokensFirst(attention_mask, sequence)
            context.last_place = (order.before + (sequence - 1)).to(torch.int32)
            context.total = torch.scalar_tensor(total, dtype=torch.int32)
            stack.enter_context(order.undone_before(self.module.get_output_embeddings()))  # type: ignore[operator]
            if self.form.rotary:
                stack.enter_context(rotation_left_to_attention(self.module))
                context.rotary = self.cos_cache, self.sin_cache  # type: ignore[assignment]
            kwargs: dict[str, Any] = {}
            if "position_ids" in inspect.signature(self.module.forward).parameters:
                kwargs["position_ids"] = order.positions + self.first if self.first else order.positions
            logits = self.call(
                parameters,
                input_ids=order.applied(input_ids),
                attention_mask=None,
                past_key_values=NoCache(),
                use_cache=True,
                **kwargs,
            ).logits
            return logits, [context.present[index] for index in self.indices]


def _causal_lm(model: Model, module: nn.Module, blocks: list[str], form: Form, outputs: list[str]) -> Signature:
    indices = layer_indices(blocks)
    config: Any = module.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inputs = {
        "input_ids": torch.zeros(BATCH, SEQUENCE, dtype=torch.long),
        "attention_mask": torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.long),
    }
    past = [(torch.zeros(BATCH, heads, PAST, size), torch.zeros(BATCH, heads, PAST, size)) for _ in indices]
    return Signature(
        _CausalLM(module, form, indices, first_position(model.module)),
        {"inputs": inputs, "past": past},
        {
            "inputs": {"input_ids": {0: "batch_size", 1: "sequence"}, "attention_mask": {0: "batch_size", 1: "total"}},
            "past": [({0: "batch_size", 2: "past"}, {0: "batch_size", 2: "past"}) for _ in past],
        },
        [*inputs, *cache_names("past_key_values", indices)],
        [*outputs, *cache_names("present", indices)],
    )


class _Encoder(Wrapper):
    def forward(self, inputs: dict[str, Tensor], parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with attention_context() as context:
            if self.form.fused:
                context.padding = inputs["attention_mask"].to(torch.int32)
            return tuple(encoder_outputs(self.module, partial(self.call, parameters), inputs).values())


def _encoder(model: Model, module: nn.Module, blocks: list[str], form: Form, outputs: list[str]) -> Signature:
    inputs = {name: torch.ones(BATCH, SEQUENCE, dtype=torch.long) for name in model.input_names}
    shapes = {"inputs": {name: {0: "batch_size", 1: "sequence"} for name in inputs}}
    return Signature(_Encoder(module, form), {"inputs": inputs}, shapes, list(inputs), outputs)


class _Module(Wrapper):
    def forward(self, inputs: dict[str, Tensor], parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.call(parameters, **inputs)))


def _module(model: Model, module: nn.Module, blocks: list[str], form: Form, outputs: list[str]) -> Signature:
    inputs = model.example_rows(BATCH)
    shapes = {"inputs": {name: None if name in model.shared_inputs else {0: "batch_size"} for name in inputs}}
    return Signature(_Module(module, form), {"inputs": inputs}, shapes, list(inputs), outputs)


# Per task that is one graph, what makes its signature.
SIGNATURES = {CAUSAL_LM: _causal_lm, ENCODER: _encoder, MODULE: _module}
