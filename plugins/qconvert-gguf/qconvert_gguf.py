"""GGUF files as models: configuration, tokenizer and tensors, dequantized one at a time."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert.plugin import InputError, hookimpl, in_one_line

if TYPE_CHECKING:
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor
    from torch import Tensor

    from qconvert.plugin import Model, TensorInfo

# Keys, tensors and elements of arrays that a file may have in all: a vocabulary of 260,000 tokens makes 1.3 million.
MAX_VALUES = 2**22
BLOCK = re.compile(r"\bblk\.(\d+)\.")
# What a model of this architecture is sized by, beside its blocks.
WIDTHS = (
    "vocab_size",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "expert_count",
    "expert_used_count",
)


@hookimpl
def load_model(source: str) -> Model | None:
    """A .gguf file; None for everything else.

    Raises InputError QC-GGUF-001 for a damaged file, 002 for one that has no exact counterpart in transformers.
    """
    path = Path(source)
    if path.suffix.lower() != ".gguf" or source.startswith("module:"):
        return None
    # torch and transformers take seconds: imported once it is known that they are needed.
    from qconvert.plugin import model_from_config, text_encoder

    if not path.is_file():
        raise InputError("QC-INPUT-001", f"source {source!a} does not exist", hint="check the path")
    reader = open_reader(path)
    if "adapter.type" in reader.fields:
        raise _unsupported(path, f"it is an adapter ({reader.fields['adapter.type'].contents()!a}), not a model")
    config = read_config(path)
    files = carried_files(path, reader, config)
    return model_from_config(
        path.stem,
        config,
        GgufSource(path, reader, config),
        files=files,
        input_files={path.name: path},
        encode_text=text_encoder(files),
    )


def open_reader(path: Path) -> GGUFReader:
    """Reads all metadata, no tensor. Raises InputError QC-GGUF-001 for a file that ends too early, is no GGUF, or tells of
    more than it holds."""
    import numpy as np
    from gguf import GGUFReader, GGUFValueType

    class StrictReader(GGUFReader):  # type: ignore[misc]
        """gguf's reader takes what is left where a file ends early, and runs on; and it believes every count, up to the end
        of the file, through gigabytes of tensors."""

        values = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            found = super()._get(offset, dtype, count, override_order)
            if len(found) < count:
                raise ValueError(f"it ends at byte {len(self.data)}, inside what begins at byte {offset}")
            return found

        def _build_fields(self, offs: int, count: int) -> int:
            self._count(count, f"{count} keys")
            return super()._build_fields(offs, count)  # type: ignore[no-any-return]

        def _build_tensor_info(self, offs: int, count: int) -> Any:
            self._count(count, f"{count} tensors")
            return super()._build_tensor_info(offs, count)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY:
                length = int(self._get(orig_offs + 4, np.uint64)[0])  # behind the type of its elements
                self._count(length, f"an array of {length}")
            return super()._get_field_parts(orig_offs, raw_type)

        def _count(self, count: int, what: str) -> None:
            self.values += int(count)
            if self.values > min(MAX_VALUES, len(self.data)):  # each takes a byte at least
                raise ValueError(f"its header claims {what}, more than a file of {len(self.data)} bytes has metadata")

    try:
        reader = StrictReader(path)
    except Exception as error:  # the reader has no errors of its own: ValueError, KeyError, IndexError, ...
        raise _damaged(path, f"{type(error).__name__}: {in_one_line(error)}") from error
    _check_sizes(path, reader)
    return reader


def _check_sizes(path: Path, reader: GGUFReader) -> None:
    """Nothing is built of blocks and widths that the file's tensors do not have. Raises InputError QC-GGUF-001."""
    blocks = {found[1] for tensor in reader.tensors if (found := BLOCK.search(tensor.name))}
    widest = max((int(size) for tensor in reader.tensors for size in tensor.shape), default=0)
    limits = {"block_count": len(blocks), **dict.fromkeys(WIDTHS, widest)}
    for key, field in reader.fields.items():
        limit = limits.get(key.partition(".")[2])
        if limit is None:
            continue
        claimed = field.contents()
        for value in claimed if isinstance(claimed, list) else [claimed]:
            if not isinstance(value, int) or value > limit:
                raise _damaged(path, f"{key!a} is {value!a}, where its tensors have {limit} at most")


def read_config(path: Path) -> dict[str, Any]:
    """What config.json would hold. Raises InputError QC-GGUF-002 for an architecture that transformers can't read."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        parsed = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # transformers raises whatever the first wrong field leads to
        raise _unsupported(path, in_one_line(error)) from error
    if parsed.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise _unsupported(path, f"model type {parsed.model_type!a} is no decoder-only language model")
    config: dict[str, Any] = json.loads(parsed.to_json_string(use_diff=True))
    return {**config, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[parsed.model_type]], "dtype": "float32"}


def carried_files(path: Path, reader: GGUFReader, config: Mapping[str, Any]) -> dict[str, Path | bytes]:
    """Generation config, and the tokenizer where the file has one, as transformers writes them."""
    from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig

    generation = GenerationConfig.from_model_config(PretrainedConfig.from_dict(dict(config)))
    files: dict[str, Path | bytes] = {"generation_config.json": generation.to_json_string().encode()}
    if "tokenizer.ggml.model" not in reader.fields:
        return files
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            tokenizer.save_pretrained(folder)
        except Exception as error:  # as above
            raise _unsupported(path, f"its tokenizer can't be converted: {in_one_line(error)}") from error
        return files | {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


class GgufSource:
    """The tensors of a GGUF file under transformers' names, float32. A TensorSource."""

    def __init__(self, path: Path, reader: GGUFReader, config: Mapping[str, Any]) -> None:
        """Raises InputError QC-GGUF-002 naming the tensors that have no exact counterpart."""
        import torch

        from qconvert.plugin import TensorInfo

        self._processor = tensor_processor(path, reader, config)
        names = tensor_names(path, config, self._processor)
        self._tensors = {names.get(tensor.name, ""): tensor for tensor in reader.tensors}
        if unplaced := [tensor.name for tensor in reader.tensors if tensor.name not in names]:
            raise _unsupported(
                path, f"transformers has no place for {len(unplaced)} tensors: {', '.join(map(ascii, unplaced[:5]))}"
            )
        _check_formats(path, reader.tensors)
        # GGUF counts dimensions from the innermost.
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(torch.float32, tuple(map(int, reversed(tensor.shape)))) for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """Return the tensor in float32, dequantized and in transformers' order of rows."""
        import numpy as np
        import torch
        from gguf import dequantize

        tensor = self._tensors[name]
        weights = self._processor.process(weights=dequantize(tensor.data, tensor.tensor_type), name=tensor.name).weights
        return torch.from_numpy(np.require(weights, np.float32, ["C", "W", "O"]))


def tensor_processor(path: Path, reader: GGUFReader, config: Mapping[str, Any]) -> Any:
    """What undoes llama.cpp's changes to tensors of this architecture, e.g. the order of rows of Llama's q and k."""
    from transformers import modeling_gguf_pytorch_utils as support

    architecture = reader.fields["general.architecture"].contents()
    processor = support.TENSOR_PROCESSORS.get(architecture, support.TensorProcessor)
    # The others merge, split or transpose tensors.
    one_to_one = (
        support.TensorProcessor,
        support.LlamaTensorProcessor,
        support.Gemma2TensorProcessor,
        support.NemotronTensorProcessor,
    )
    if processor not in one_to_one:
        raise _unsupported(path, f"tensors of architecture {architecture!a} do not map one to one onto transformers'")
    return processor(config=dict(config))


def tensor_names(path: Path, config: Mapping[str, Any], processor: Any) -> dict[str, str]:
    """GGUF name -> transformers name of every tensor that the model can have."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    from qconvert.plugin import build_skeleton

    module, _ = build_skeleton(config)
    try:
        names: dict[str, str] = get_gguf_hf_weights_map(module, processor)
    except NotImplementedError as error:
        raise _unsupported(path, in_one_line(error)) from error
    return names


def _check_formats(path: Path, tensors: list[ReaderTensor]) -> None:
    """One row of every number format is tried before work begins."""
    from gguf import dequantize

    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors}.items():
        try:
            dequantize(tensor.data[:1], kind)
        except NotImplementedError as error:
            raise _unsupported(path, f"tensor {tensor.name!a} is in format {kind.name}: {error}") from error


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(
        "QC-GGUF-001",
        f"{path} ({path.stat().st_size} bytes) is no complete GGUF file: {problem}",
        hint="download it again, and compare its size and sha256 with the publisher's",
    )


def _unsupported(path: Path, problem: str) -> InputError:
    return InputError(
        "QC-GGUF-002", f"{path}: {problem}", hint="convert the original Hugging Face checkpoint that the file was made from"
    )
