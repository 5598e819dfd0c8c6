"""Tiny models for the tests of calibrate/ and execution/block_runner.py, each a skeleton with its weights in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qconvert.calibrate import Participant, calibrate
from qconvert.execution.materialize import ReadParameter
from qconvert.ir.batch import Batch
from qconvert.ir.layer import Block, LayerKind
from qconvert.ir.model import Model, TensorInfo
from qconvert.ir.plan import LayerPlan, Plan
from qconvert.ir.samples import Samples
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import InputGroup, Template
from qconvert.job import Job
from qconvert.plugin.quantizer import Quantizer
from qconvert.quantizers.per_channel import PerChannelQuantizer
from qconvert.recipe import Recipe
from qconvert.tuners.signround import SignRound

VOCABULARY = 100


@dataclass
class InMemory:
    """A TensorSource that logs what is read."""

    held: dict[str, Tensor]
    reads: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in self.held.items()}

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.held[name]


def encode_numbers(text: str) -> list[int]:
    """A tokenizer for texts of numbers."""
    return [int(word) for word in text.split()]


def model_of(plain: nn.Module, task: str = "module", **fields: Any) -> Model:
    """The Model of a plain module: its skeleton on meta, its weights in an InMemory source."""
    skeleton = copy.deepcopy(plain).eval()
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    stored = dict(plain.named_parameters())  # each tied parameter under its first name
    meta = {id(value): nn.Parameter(value.detach().to("meta"), requires_grad=False) for value in parameters.values()}
    for name, value in parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(skeleton.get_submodule(owner), leaf, meta[id(value)])
    first = {id(value): name for name, value in stored.items()}
    tied = {
        name: first[id(value)] for name, value in plain.named_parameters(remove_duplicate=False) if first[id(value)] != name
    }
    source = InMemory({name: value.detach().clone() for name, value in stored.items()})
    return Model(name="tiny", task=task, module=skeleton, source=source, tied=tied, **fields)  # type: ignore[arg-type]


def text_model(plain: Any, task: str, prefix: str, **fields: Any) -> Model:
    config = plain.config
    blocks = tuple(f"{prefix}.{index}" for index in range(config.num_hidden_layers))
    return model_of(
        plain,
        task,
        blocks=blocks,
        input_names=("input_ids", "attention_mask"),
        output_head="lm_head" if task == "causal-lm" else None,
        encode_text=encode_numbers,
        config={"max_position_embeddings": 64, "pad_token_id": 0},
        **fields,
    )


def _spread(plain: nn.Module) -> nn.Module:
    """Weights large enough that every part of the model matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return plain.eval()


def tiny_llama(tied: bool = True) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    return _spread(LlamaForCausalLM(config))


def tiny_gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    return _spread(GPT2LMHeadModel(config))


def tiny_bert(head: bool = False) -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return _spread(BertForSequenceClassification(config) if head else BertModel(config))


def llama(tied: bool = True) -> tuple[Any, Model]:
    plain = tiny_llama(tied)
    return plain, text_model(plain, "causal-lm", "model.layers")


def gpt2() -> tuple[Any, Model]:
    plain = tiny_gpt2()
    return plain, text_model(plain, "causal-lm", "transformer.h")


def t5() -> tuple[Any, Model]:
    """An encoder-decoder: the first block of each half owns the position biases that the others are handed."""
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=7, pad_token_id=0,
    )  # fmt: skip
    plain = _spread(T5ForConditionalGeneration(config))
    names = {"encoder.block": 3, "decoder.block": 2}
    return plain, model_of(
        plain,
        "seq2seq-lm",
        blocks=tuple(f"{stack}.{index}" for stack, count in names.items() for index in range(count)),
        input_names=("input_ids", "attention_mask", "decoder_input_ids"),
        output_head="lm_head",
        encode_text=encode_numbers,
        config={"pad_token_id": 0},
    )


def bert() -> tuple[Any, Model]:
    plain = tiny_bert()
    return plain, text_model(plain, "encoder", "encoder.layer")


def plan_of(model: Model, kept_float: tuple[str, ...] = ()) -> Plan:
    """A plan that quantizes every linear and convolution, but for those kept in float."""
    scheme = QuantScheme.parse("int8-channel")
    layers: dict[str, LayerPlan] = {}
    for name, module in model.module.named_modules():
        kind: LayerKind | None = _kind(module)
        if kind and name not in kept_float:
            shape = module.weight.shape
            out, width = (shape[1], shape[0]) if kind == "conv1d" else (shape[0], shape[1:].numel())
            layers[name] = LayerPlan(name, kind, out, width, scheme)
    return Plan(scheme, layers, (), True, 0, {})


def job_of(
    model: Model,
    plan: Plan,
    groups: Sequence[InputGroup] = (),
    quantizer: Quantizer | None = None,
    batches: Sequence[Batch] = (),
    **settings: Any,
) -> Job:
    """The job of a model that nobody has traced.

    settings: of the recipe.
    """
    recipe = Recipe.from_settings({"model": "module:mine", "output": "out", **settings})
    template = Template({}, {}, tuple(groups))
    tuner = SignRound(**recipe.tuning.settings) if recipe.tuning else None
    samples = Samples(tuple(batches), ())
    return Job(recipe, recipe, quantizer or PerChannelQuantizer(), model, template, plan, samples, tuner=tuner)


def calibrated(
    *job: Any, done: frozenset[str] = frozenset(), written: Callable[[], ReadParameter] | None = None, **settings: Any
) -> Iterator[Block]:
    """The blocks of `job_of(*job, **settings)`, but for those that are done."""
    return calibrate([Participant(job_of(*job, **settings), done)], written)


def _kind(module: nn.Module) -> LayerKind | None:
    kinds: dict[str, LayerKind] = {"Linear": "linear", "Conv1D": "conv1d", "Conv2d": "conv2d"}
    return kinds.get(type(module).__name__)


def token_batch(lengths: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Random token ids, one row per length, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def source_batch(lengths: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """`token_batch` as sources, with as many random tokens for the decoder."""
    batch = token_batch(lengths, seed)
    return {**batch, "decoder_input_ids": token_batch((max(lengths),) * len(lengths), seed + 100)["input_ids"]}
