"""Tiny random models of every architecture that qconvert is tested on, made from their transformers configs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from qconvert.ir.model import Model
from qconvert.load.hugging_face import load_folder

VOCABULARY, LAYERS = 100, 4
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SLIDING: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}


def _decoder(name: str, model: str = "", config: str = "", **settings: object) -> Callable[[], PreTrainedModel]:
    """model, config: the classes, where they are not named as usual."""

    def build() -> PreTrainedModel:
        made = getattr(transformers, config or f"{name}Config")(**settings)
        return getattr(transformers, model or f"{name}ForCausalLM")(made)

    return build


def _encoder(name: str, **settings: object) -> Callable[[], PreTrainedModel]:
    return lambda: getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))


# name -> (where its blocks are, what builds it, what is special about it)
DECODERS: dict[str, tuple[str, Callable[[], PreTrainedModel], str]] = {
    "llama": ("model.layers", _decoder("Llama", **DECODER), ""),
    "mistral": ("model.layers", _decoder("Mistral", **DECODER, sliding_window=4), "sliding window"),
    "qwen2": ("model.layers", _decoder("Qwen2", **DECODER), "biases of query, key and value"),
    "qwen3": ("model.layers", _decoder("Qwen3", **DECODER, head_dim=16), "norms of query and key"),
    "gemma2": (
        "model.layers",
        _decoder("Gemma2", **DECODER, head_dim=16, query_pre_attn_scalar=16, **SLIDING),
        "soft caps, sliding window",
    ),
    "gemma3_text": (
        "model.layers",
        _decoder("Gemma3", config="Gemma3TextConfig", **DECODER, head_dim=16, query_pre_attn_scalar=16, **SLIDING),
        "two rotary embeddings, sliding window",
    ),
    "phi3": ("model.layers", _decoder("Phi3", **DECODER), "packed linears"),
    "smollm3": ("model.layers", _decoder("SmolLM3", **DECODER, no_rope_layers=[1, 0] * 2), "layers without rotation"),
    "granite": (
        "model.layers",
        _decoder("Granite", **DECODER, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=2.0),
        "multipliers",
    ),
    "olmo2": ("model.layers", _decoder("Olmo2", **DECODER), "norms after attention and MLP"),
    "gpt_neox": ("gpt_neox.layers", _decoder("GPTNeoX", **WIDE, rotary_pct=0.5), "partial rotation, parallel blocks"),
    "phi": ("model.layers", _decoder("Phi", **DECODER), "partial rotation, parallel blocks"),
    "gpt2": (
        "transformer.h",
        _decoder(
            "GPT2",
            model="GPT2LMHeadModel",
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=LAYERS,
            n_head=4,
            n_positions=64,
            eos_token_id=2,
            bos_token_id=1,
        ),
        "Conv1D, learned positions",
    ),
    "opt": (
        "model.decoder.layers",
        _decoder(
            "OPT",
            vocab_size=VOCABULARY,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
        ),
        "learned positions, ReLU",
    ),
}
ENCODERS: dict[str, tuple[str | tuple[()], Callable[[], PreTrainedModel], str]] = {
    "bert": ("encoder.layer", _encoder("Bert", **ENCODER), ""),
    "distilbert": (
        "transformer.layer",
        _encoder("DistilBert", vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64),
        "",
    ),
    "roberta": ("encoder.layer", _encoder("Roberta", **ENCODER), ""),
    "mpnet": ("encoder.layer", _encoder("MPNet", **ENCODER), "relative positions"),
    "electra": ("encoder.layer", _encoder("Electra", **ENCODER, embedding_size=16), "projected embeddings"),
    "albert": ((), _encoder("Albert", **ENCODER, embedding_size=16), "one layer that runs many times"),
}


SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
T5: dict[str, Any] = {**SEQ2SEQ, "d_kv": 16, "d_ff": 96, "num_layers": 4, "num_decoder_layers": 3, "num_heads": 4}
BART: dict[str, Any] = {
    **SEQ2SEQ,
    "encoder_layers": 3,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
}


def _encoder_decoder(name: str, model: str = "", **settings: Any) -> Callable[[], PreTrainedModel]:
    return _decoder(name, model or f"{name}ForConditionalGeneration", **settings)


T5_STACKS, BART_STACKS = ("encoder.block", "decoder.block"), ("model.encoder.layers", "model.decoder.layers")

# name -> (where the blocks of both halves are, what builds it, what is special about it)
ENCODER_DECODERS: dict[str, tuple[tuple[str, str], Callable[[], PreTrainedModel], str]] = {
    "t5": (T5_STACKS, _encoder_decoder("T5", **T5), "relative positions, shared by all blocks"),
    "mt5": (
        T5_STACKS,
        _encoder_decoder("MT5", **T5, feed_forward_proj="gated-gelu"),
        "relative positions, shared by all blocks; gated MLP",
    ),
    "umt5": (T5_STACKS, _encoder_decoder("UMT5", **T5), "relative positions of every block"),
    "bart": (BART_STACKS, _encoder_decoder("Bart", **BART, bos_token_id=1), "learned positions, norms after attention and MLP"),
    "marian": (BART_STACKS, _encoder_decoder("Marian", "MarianMTModel", **BART, bos_token_id=1), "sinusoidal positions"),
    "pegasus": (BART_STACKS, _encoder_decoder("Pegasus", **BART, bos_token_id=1), "sinusoidal positions, norms before"),
}


@cache
def _checkpoints() -> tempfile.TemporaryDirectory[str]:
    """Where they are saved; the folder goes when Python ends."""
    return tempfile.TemporaryDirectory()


def build(name: str) -> Model:
    """The model of that name, loaded from the folder to which transformers saved it; its norms and biases are random, too."""
    _, make, _ = ({**DECODERS, **ENCODERS, **ENCODER_DECODERS})[name]
    torch.manual_seed(0)
    module = make().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.dim() == 1 else 0.15)
    folder = Path(_checkpoints().name) / name
    module.save_pretrained(folder)
    return load_folder(folder)
