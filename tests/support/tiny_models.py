"""Tiny checkpoints with random but fixed weights and real tokenizers, for everyone's tests."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 384  # the 256 bytes, 5 special tokens, and merges


def tiny_llama(folder: Path, *, dtype: torch.dtype = torch.float32, tie: bool = True, shards: int = 1) -> Path:
    """A Llama of 2 layers: hidden 64, MLP 128, 4 heads, 2 key and value heads. Returns `folder`."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return save_checkpoint(_random(LlamaForCausalLM, config), folder, dtype=dtype, shards=shards)


def tiny_gpt2(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A GPT-2 of 2 layers: hidden 64, 4 heads; its linears are Conv1D, stored as [in, out]; tied. Returns `folder`."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return save_checkpoint(_random(GPT2LMHeadModel, config), folder, dtype=dtype)


def tiny_bert(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A BERT encoder of 2 layers: hidden 64, MLP 128, 4 heads, 2 token types. Returns `folder`."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    return save_checkpoint(_random(BertModel, config), folder, dtype=dtype, sentence_tokens=True)


def tiny_t5(folder: Path, *, dtype: torch.dtype = torch.float32, gated: bool = False, tie: bool = True) -> Path:
    """A T5 with 3 blocks in the encoder and 2 in the decoder: hidden 64, MLP 128, 4 heads; returns `folder`.

    gated: the MLP of T5 1.1. tie: whether the head is the embedding; real checkpoints of 1.1 have two tensors.
    """
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=tie,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    save_checkpoint(_random(T5ForConditionalGeneration, config), folder, dtype=dtype, sentence_tokens=True)
    if not tie:
        tensors = load_file(folder / "model.safetensors")
        save_tensors({**tensors, "lm_head.weight": tensors["shared.weight"].roll(1, 0)}, folder)
    return folder


def save_checkpoint(
    model: PreTrainedModel, folder: Path, *, dtype: torch.dtype = torch.float32, shards: int = 1, sentence_tokens: bool = False
) -> Path:
    """Write the model, in exactly `shards` files, with a tokenizer; sentence_tokens: texts become [CLS] ... [SEP]."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = model.all_tied_weights_keys
    tensors = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items() if name not in tied}
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_tensors(tensors, folder, shards)
    save_tokenizer(folder, sentence_tokens=sentence_tokens)
    return folder


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path, shards: int = 1) -> None:
    """model.safetensors, or so many shards and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def save_tokenizer(folder: Path, *, sentence_tokens: bool = False) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE, ids below VOCABULARY."""
    tokenizer = Tokenizer.from_str(_trained_tokenizer())
    if sentence_tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 256,
        "pad_token": "[PAD]",
        "bos_token": "[CLS]",
        "eos_token": "[SEP]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


@cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics["class"], topics["lambda"], topics["strings"]], trainer)
    return str(tokenizer.to_str())


def _random(model_class: type[PreTrainedModel], config: object) -> PreTrainedModel:
    """Weights that are large enough for the output to depend on the input, the same on every machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model
