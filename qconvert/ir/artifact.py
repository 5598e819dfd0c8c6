"""An artifact as it was written: where each of its tensors lies, and the file names of an output folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
SIDECAR = "qconvert.bin"
GRAPH = "model.onnx"
GENAI_CONFIG = "genai_config.json"
MANIFEST = "qconvert.json"
REPORT = "report.json"
CARD = "README.md"
CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib")
# What stands before the colon in the names of the manifest's inputs that are no files of the model.
INPUT_KINDS = ("calibration", "evaluation", "samples", "graph", "option", "tuner", "ranges", "code")


def weight_file_names(count: int) -> tuple[str, ...]:
    """Return the names of so many files of weights: that of a single one, or those that transformers gives to shards."""
    return (WEIGHTS,) if count == 1 else tuple(f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1))


def is_model_file(name: str) -> bool:
    """Return whether an input of the manifest is a file of the model, or stands for it: "config.json", not "code:qconvert"."""
    kind, colon, _ = name.partition(":")
    return not colon or kind not in INPUT_KINDS


def is_code(name: str) -> bool:
    """Return whether a file beside a model is code, never run, or says what was installed: the output holds neither."""
    path = PurePosixPath(name)
    return path.suffix in CODE or any(part.endswith((".dist-info", ".egg-info")) for part in path.parts)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk: `nbytes` bytes at `offset` (absolute, in bytes) of `file` in the output folder."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


# Metadata on the last node of a layer with int8 activations: its module, and the value that the layer reads. Layers packed
# into one are named one after the other, in the order of their channels.
LAYER_KEY = "qconvert.layer"
INPUT_KEY = "qconvert.input"
# There too: whether what the codes of a row leave over is quantized once more. Layers with packed weights that are named so
# multiply int8 weights that are derived from those (ir/prompt_weights.py).
REST_KEY = "qconvert.rest"
CLUSTER_KEYS = (LAYER_KEY, INPUT_KEY, REST_KEY)
LAYER_SEPARATOR = ","
