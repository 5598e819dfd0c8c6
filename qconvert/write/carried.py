"""The files that travel with the weights: tokenizer, generation config, chat template."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path, PurePosixPath

from qconvert.errors import InputError
from qconvert.ir.artifact import CARD, GENAI_CONFIG, MANIFEST, REPORT, SHARD, SIDECAR, WEIGHTS, WEIGHTS_INDEX, is_code
from qconvert.ir.model import Model
from qconvert.ir.task import TASKS
from qconvert.storage.disk import disk_errors
from qconvert.storage.stage import Stage
from qconvert.targets import TARGETS, graph_files

log = logging.getLogger("qconvert")

# What other tools apply to the weights that they find beside it, wherever it came from: transformers with peft an adapter;
# vLLM, SGLang and TensorRT-LLM the settings of another quantizer.
ABOUT_OTHER_WEIGHTS = (
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    *("hf_quant_config.json", "quantize_config.json", "quant_config.json"),
)
# Names that the output has its own files for, or that would describe the weights of the source.
OWN_FILES = {
    CARD.lower(),
    "config.json",
    *(GENAI_CONFIG, MANIFEST, REPORT, SIDECAR, WEIGHTS, WEIGHTS_INDEX),
    *(name for task in TASKS.values() for target in TARGETS.values() for name in graph_files(task, target).values()),
}


def write_carried(model: Model, stage: Stage) -> None:
    """Copy `model.files` into the stage. Raises InputError QC-WRITE-003 for a name that leads out of the folder."""
    for name, content in sorted(model.files.items()):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise InputError(
                "QC-WRITE-003",
                f"{model.name}: file {name!a} to carry over leads out of the output folder",
                hint="remove it from the checkpoint, or mend the plugin that loaded it",
            )
        if _is_own(name.lower()) or is_code(name):  # lower: the file system may ignore case
            continue
        if path.name.lower() in ABOUT_OTHER_WEIGHTS:
            log.warning("%s is not carried over: it is for other weights than those written here", ascii(name))
            continue
        target = stage.folder / path
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, target)
            else:
                target.write_bytes(content)


def _is_own(name: str) -> bool:
    return name in OWN_FILES or SHARD.fullmatch(name) is not None
