"""Model: a checkpoint that is described in full and read lazily."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from qconvert.ir.batch import Batch, row_count, unpadded
from qconvert.ir.task import TASKS, Task

if TYPE_CHECKING:
    from qconvert.ir.trained import Trained

# Significant bits of a float, where they are less than those of float32.
NARROW_BITS = {torch.bfloat16: 8, torch.float16: 11}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The dtype and shape of a tensor, as a header gives them without its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All stored tensors by name, in a fixed order. Aliases (tied weights) are not repeated here."""

    def read(self, name: str) -> Tensor:
        """Return the tensor in its stored dtype, contiguous; a view of mapped memory where possible, so never written to."""


# What `Model.encode_text` returns for one text: token ids of any length, special tokens put in.
EncodeText = Callable[[str], list[int]]


def stack_of(block: str) -> str:
    """Return the list that a block is in: "encoder.block" for "encoder.block.3"."""
    return block.rpartition(".")[0]


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A loaded model: what it computes (module), what it holds (source), and what travels with it (files).

    name: for people, e.g. the folder's name.
    task: one of qconvert.ir.task.TASKS; its name does: "causal-lm" (token ids -> logits, with a KV cache), "seq2seq-lm"
        (source and decoder's token ids -> logits, with a KV cache), "encoder" (token ids -> last_hidden_state, and what its
        heads give) or "module".
    module: the skeleton in eval mode: parameters on the meta device, buffers real and in float32.
    source: stored tensors under the module's own state-dict names.
    blocks: names of the repeated blocks in forward order, e.g. "model.layers.0"; () for a model that runs whole. An
        encoder-decoder has two stacks of them, "encoder.block.0", ..., "decoder.block.0", ...
    tied: parameter name -> name of the stored tensor that it shares, e.g. {"lm_head.weight": "model.embed_tokens.weight"}.
    unplaced: tensors of the source that the module has no place for -> why it computes the same without them.
    output_head: module name of the layer that nothing but outputs come after: a language model's head, or the linear layer
        of an encoder's pooler; None where there is none.
    input_names: of the forward's tensor inputs, in order; for a "module" also the names in the ONNX graph.
    example_inputs: for a "module": tensors by input name, first axis = rows, but for `shared_inputs`; {} for text models.
    encode_text: for text models; None where no tokenizer came with the checkpoint.
    config: config.json as it was read, None for a "module".
    files: non-weight files to carry over: relative path -> path or content.
    input_files: what the run depends on, for the manifest's digests: name without any folder outside -> path, or content
        that stands for what lies in no file.
    folder: the checkpoint's own folder, where no output may lie; None for other sources.
    trained: what quantization-aware training has made of the model; None for other sources.
    adapter: modules of an adapter that stays beside the layers, in float: "LAYER.lora_A" and "LAYER.lora_B".
    """

    name: str
    task: Task
    module: nn.Module
    source: TensorSource
    blocks: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    unplaced: Mapping[str, str] = field(default_factory=dict)
    output_head: str | None = None
    input_names: tuple[str, ...] = ()
    example_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    encode_text: EncodeText | None = None
    config: Mapping[str, Any] | None = None
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    input_files: Mapping[str, Path | bytes] = field(default_factory=dict)
    folder: Path | None = None
    trained: Trained | None = None
    adapter: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        # Loaders of plugins give the name; one that is unknown is left for the contract to refuse (loader_contract.py).
        object.__setattr__(self, "task", TASKS.get(str(self.task), self.task))

    def stored_name(self, parameter: str) -> str:
        """Return the name under which the source holds a parameter of the module."""
        return self.tied.get(parameter, parameter)

    def read(self, parameter: str) -> Tensor:
        """Return the stored tensor of a parameter, tied names resolved."""
        return self.source.read(self.stored_name(parameter))

    def block_of(self, name: str) -> str:
        """Return the block that a module or parameter belongs to, "" for what lies outside the repeated blocks."""
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            prefix = ".".join(parts[:end])
            if prefix in self.blocks:
                return prefix
        return ""

    @property
    def scale_bits(self) -> int:
        """The significant bits that loaders keep of a scale: transformers and vLLM cast it to the dtype in config.json."""
        return NARROW_BITS.get(self.loaded_dtype, 24)

    @property
    def loaded_dtype(self) -> torch.dtype:
        """The dtype in config.json, to which loaders cast weights; float32 where there is none."""
        dtype = None if self.config is None else getattr(getattr(self.module, "config", None), "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    @property
    def shared_inputs(self) -> frozenset[str]:
        """The inputs of a "module" that all rows share, such as a timestep: scalars, and one row beside many of others."""
        inputs = self.example_inputs
        return frozenset(name for name, value in inputs.items() if not value.ndim or len(value) < row_count(inputs))

    def take_rows(self, inputs: Mapping[str, Tensor], rows: slice | Tensor) -> Batch:
        """Return some rows of a module's inputs. rows: an index of their first axis."""
        return {name: value if name in self.shared_inputs else value[rows] for name, value in inputs.items()}

    def single_rows(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the rows of all batches, each by itself and without padding."""
        for batch in batches:
            for number in range(row_count(batch)):
                yield unpadded(self.take_rows(batch, slice(number, number + 1)))

    def example_rows(self, count: int) -> Batch:
        """Return `count` rows of the example inputs; where there are fewer, they repeat."""
        return self.take_rows(self.example_inputs, torch.arange(count) % row_count(self.example_inputs))

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """The blocks, those of one list together: within a stack each block hands its hidden state to the next."""
        return tuple(tuple(stack) for _, stack in groupby(self.blocks, stack_of))

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The content of generation_config.json, {} without one."""
        content = self.files.get("generation_config.json", b"{}")
        found: dict[str, Any] = json.loads(content if isinstance(content, bytes) else content.read_bytes())
        return found

    @property
    def decoder_start(self) -> int:
        """The token that an encoder-decoder's decoder begins with, found as transformers' generate finds it."""
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            for token in (self.generation_config.get(name), getattr(self.module.config, name, None)):
                if isinstance(token, int):
                    return token
        return 0

    @property
    def input_paths(self) -> list[Path]:
        """The files and folders that are read, and must not be written."""
        paths = [path for path in self.input_files.values() if isinstance(path, Path)]
        return paths if self.folder is None else [self.folder, *paths]

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter of the module by name, a tied one under each of its names."""
        return {name: tuple(parameter.shape) for name, parameter in self.module.named_parameters(remove_duplicate=False)}

    @property
    def source_bytes(self) -> int:
        """The bytes of all stored tensors."""
        return sum(info.nbytes for info in self.source.tensors.values())
