"""Tiny transformers of several architectures, traced once per test run, and what their graphs compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx_ir
import torch
import transformers
from calibrate_models import VOCABULARY, model_of
from torch import Tensor, nn

from qconvert.graph.float_graph import float_graph
from qconvert.ir.model import Model
from qconvert.ir.template import Template
from qconvert.ort.compare import feed
from qconvert.ort.session import memory_session
from qconvert.trace import trace

# Heads of 16: GroupQueryAttention does not rotate smaller ones.
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# Windows of 4 tokens on every other layer.
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def _gemma3() -> Any:
    config = transformers.Gemma3TextConfig(**DECODER, **SLIDING, head_dim=16, query_pre_attn_scalar=16)
    return transformers.Gemma3ForCausalLM(config)


def _gemma2() -> Any:
    config = transformers.Gemma2Config(**DECODER, **SLIDING, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=2.0)
    return transformers.Gemma2ForCausalLM(config)


def _smollm3() -> Any:
    return transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**DECODER, no_rope_layer_interval=2))


def _distilbert() -> Any:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64
    )
    return transformers.DistilBertModel(config)


DECODERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "llama": ("model.layers", lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))),
    "gpt2": ("transformer.h", _gpt2),
    "smollm3": ("model.layers", _smollm3),
    "gemma2": ("model.layers", _gemma2),
    "gemma3": ("model.layers", _gemma3),
}
ENCODERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "bert": ("encoder.layer", lambda: transformers.BertModel(transformers.BertConfig(**ENCODER))),
    "roberta": ("encoder.layer", lambda: transformers.RobertaModel(transformers.RobertaConfig(**ENCODER, pad_token_id=0))),
    "distilbert": ("transformer.layer", _distilbert),
    "mpnet": ("encoder.layer", lambda: transformers.MPNetModel(transformers.MPNetConfig(**ENCODER, pad_token_id=0))),
}
TOKEN_TYPES = ("bert",)


@dataclass(frozen=True, eq=False)
class Traced:
    """plain: the model in torch; session: its float graph in ONNX Runtime."""

    plain: nn.Module
    model: Model
    template: Template
    session: Any

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; caches that are not given are empty."""
        names = [output.name for output in self.session.get_outputs()]
        fed = feed(self.session, {name: value for name, value in inputs.items() if not name.startswith("past")})
        fed |= {name: value.numpy() for name, value in inputs.items()}
        return dict(zip(names, map(torch.from_numpy, self.session.run(None, fed)), strict=True))


def build(name: str) -> tuple[nn.Module, Model]:
    """A model by its name in DECODERS or ENCODERS, and its Model with the weights in memory."""
    decoder = name in DECODERS
    prefix, make = (DECODERS | ENCODERS)[name]
    torch.manual_seed(0)
    plain = make().eval()
    with torch.no_grad():
        for parameter in plain.parameters():  # large enough that every part of the model matters
            parameter.add_(torch.randn_like(parameter) * 0.2)
    blocks = tuple(f"{prefix}.{index}" for index in range(len(plain.get_submodule(prefix))))  # type: ignore[arg-type]
    inputs = ("input_ids", "attention_mask", *(("token_type_ids",) if name in TOKEN_TYPES else ()))
    return plain, model_of(plain, "causal-lm" if decoder else "encoder", blocks=blocks, input_names=inputs)


@cache
def traced(name: str) -> Traced:
    plain, model = build(name)
    template = trace(model)
    return Traced(plain, model, template, float_session(model, template))


def float_session(model: Model, template: Template) -> Any:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.module.named_parameters(remove_duplicate=False)}

    def read(name: str) -> Tensor:
        return template.constants[name] if name in template.constants else model.read(name)

    return memory_session(float_graph(template.graphs["model"], shapes), read)


def structure(graph: onnx_ir.Graph) -> dict[str, str]:
    """Output name -> all that is computed for it: ops, attributes, inputs and constants, whatever their inner names."""
    known: dict[onnx_ir.Value, str] = {}
    for value in graph.inputs:
        known[value] = f"input {value.name}"
    for value in graph.initializers.values():
        constant = value.const_value
        lazy = constant is None or isinstance(constant, onnx_ir.LazyTensor)
        known[value] = f"parameter {value.name}" if lazy else f"constant {constant.numpy().tolist()}"  # type: ignore[union-attr]
    ids: dict[str, str] = {}
    for node in graph:
        attributes = {name: str(attribute.value) for name, attribute in sorted(node.attributes.items())}
        inputs = ["" if value is None else known[value] for value in node.inputs]
        text = f"{node.domain}.{node.op_type} {attributes} {inputs}"
        # A short name for what may be a long text, the same for the same text.
        short = f"node {hash(text):x}"
        assert ids.setdefault(short, text) == text
        known.update({value: f"{short}.{index}" for index, value in enumerate(node.outputs)})
    return {str(value.name): known[value] for value in graph.outputs}
