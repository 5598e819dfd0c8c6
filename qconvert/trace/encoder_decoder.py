"""The two graphs of an encoder-decoder.

encoder   input_ids, attention_mask -> last_hidden_state, and per decoder layer the key and value of its attention to the
          source (cross_key_values.N.key, .value: [batch, heads, source, head_size])
decoder   input_ids, encoder_attention_mask, cross_key_values, past_key_values -> logits, present

The keys and values of the source are computed once per source, by the decoder's own linears, and not at every token. Which
linears those are is not looked up: the model runs on a stand-in for its cache, which takes what it is given to keep.
"""

from __future__ import annotations

from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from qconvert.trace.attention import EncoderDecoderStandIn, attention_context
from qconvert.trace.signature import BATCH, PAST, SEQUENCE, Form, Signature, Wrapper, cache_names, layer_indices

SOURCE = 4

Caches = list[tuple[Tensor, Tensor]]


class _Encoder(Wrapper):
    """Runs encoder and decoder for the keys and values that the decoder makes of the encoder's output; nothing else of
    the decoder is given, so nothing else of it is left in the graph."""

    def __init__(self, module: nn.Module, form: Form, indices: list[int]) -> None:
        super().__init__(module, form)
        self.indices = indices

    def forward(self, inputs: dict[str, Tensor], parameters: dict[str, Tensor]) -> tuple[Tensor, Caches]:
        states: list[Any] = []
        encoder = self.module.get_encoder()  # type: ignore[operator]
        hook = encoder.register_forward_hook(lambda module, args, output: states.append(output[0]))
        with attention_context() as context:
            context.padding = inputs["attention_mask"].to(torch.int32)
            try:
                self.call(
                    parameters,
                    **inputs,
                    decoder_input_ids=inputs["input_ids"][:, :1],
                    past_key_values=EncoderDecoderStandIn(),
                    use_cache=True,
                )
            finally:
                hook.remove()
            return states[0], [context.cross[index] for index in self.indices]


def encoder(module: nn.Module, decoder_blocks: list[str], form: Form) -> Signature:
    """Return the signature of the encoder's graph, which also gives the keys and values of the decoder's blocks."""
    indices = layer_indices(decoder_blocks)
    inputs = {name: torch.ones(BATCH, SOURCE, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    return Signature(
        _Encoder(module, form, indices),
        {"inputs": inputs},
        {"inputs": {name: {0: "batch_size", 1: "source"} for name in inputs}},
        list(inputs),
        ["last_hidden_state", *cache_names("cross_key_values", indices)],
    )


class _Decoder(Wrapper):
    def __init__(self, module: nn.Module, form: Form, indices: list[int]) -> None:
        super().__init__(module, form)
        self.indices = indices

    def forward(
        self, inputs: dict[str, Tensor], cross: Caches, past: Caches, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, Caches]:
        mask = inputs["encoder_attention_mask"]
        with attention_context() as context:
            context.padding = mask.to(torch.int32)
            context.cross = dict(zip(self.indices, cross, strict=True))
            context.past = dict(zip(self.indices, past, strict=True))
            # Nobody reads the encoder's output: its keys and values are there already.
            unread = BaseModelOutput(last_hidden_state=torch.zeros(*mask.shape, 1))
            logits = self.call(
                parameters,
                encoder_outputs=unread,
                attention_mask=mask,
                decoder_input_ids=inputs["input_ids"],
                past_key_values=EncoderDecoderStandIn(),
                use_cache=True,
            ).logits
            return logits, [context.present[index] for index in self.indices]


def decoder(module: nn.Module, decoder_blocks: list[str], form: Form, encoder_graph: onnx_ir.Graph) -> Signature:
    """Return the signature of the decoder's graph. encoder_graph: gives the heads and the head size of the decoder's caches."""
    indices = layer_indices(decoder_blocks)
    key = next(value for value in encoder_graph.outputs if value.name == f"cross_key_values.{indices[0]}.key")
    assert key.shape is not None
    heads, size = int(key.shape[1]), int(key.shape[3])  # type: ignore[arg-type]

    def caches(length: int) -> Caches:
        return [(torch.zeros(BATCH, heads, length, size), torch.zeros(BATCH, heads, length, size)) for _ in indices]

    def dynamic(length: str) -> list[tuple[dict[int, str], dict[int, str]]]:
        return [({0: "batch_size", 2: length}, {0: "batch_size", 2: length}) for _ in indices]

    inputs = {
        "input_ids": torch.zeros(BATCH, SEQUENCE, dtype=torch.long),
        "encoder_attention_mask": torch.ones(BATCH, SOURCE, dtype=torch.long),
    }
    return Signature(
        _Decoder(module, form, indices),
        {"inputs": inputs, "cross": caches(SOURCE), "past": caches(PAST)},
        {
            "inputs": {"input_ids": {0: "batch_size", 1: "sequence"}, "encoder_attention_mask": {0: "batch_size", 1: "source"}},
            "cross": dynamic("source"),
            "past": dynamic("past"),
        },
        [*inputs, *cache_names("cross_key_values", indices), *cache_names("past_key_values", indices)],
        ["logits", *cache_names("present", indices)],
    )
