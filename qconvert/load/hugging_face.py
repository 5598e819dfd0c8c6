"""Hugging Face folders: config.json, safetensors, tokenizer. No code of the checkpoint runs, no weight is read early."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qconvert.errors import InputError
from qconvert.execution.probes import vocabulary_size
from qconvert.ir.artifact import WEIGHTS_INDEX
from qconvert.ir.model import Model, TensorSource
from qconvert.ir.task import Task
from qconvert.load import names, skeleton, structure
from qconvert.load.computed import computed_tensors
from qconvert.load.folder import CONFIG, carried_files, contained, no_folder, read_json, refuse_adapter
from qconvert.load.names import RenamedSource
from qconvert.load.safetensors import open_folder
from qconvert.load.tokenizer import TextEncoder, text_encoder
from qconvert.load.unplaced import unplaced_tensors

UNREAD_TENSORS = 100  # in a checkpoint that can't be opened: no more layers than they can fill are built for a better message
# What says that weights are of another class: parameters are missing, or tensors have no place.
WRONG_CLASS = ("QC-INPUT-015", "QC-INPUT-024")

log = logging.getLogger("qconvert")


def load_folder(folder: Path) -> Model:
    """Load the checkpoint in a folder as transformers' save_pretrained writes it.

    Raises InputError: QC-INPUT-001 for no such folder, and what folder, safetensors, skeleton and names raise.
    """
    if not folder.is_dir():
        raise no_folder(folder)
    refuse_adapter(folder)
    if not (folder / CONFIG).is_file():
        raise InputError("QC-INPUT-002", f"{folder} has no {CONFIG}", hint="give the folder of a Hugging Face checkpoint")
    config_path = contained(folder, CONFIG)
    config = read_json(config_path, "QC-INPUT-011")
    try:
        source = open_folder(folder)
    except InputError:  # a kind of model that no weights would make convertible is told first
        skeleton.refuse_empty_layers(config, UNREAD_TENSORS)
        skeleton.build_skeleton(skeleton.checked_config(config))
        raise
    files = carried_files(folder)
    index = {WEIGHTS_INDEX: folder / WEIGHTS_INDEX} if (folder / WEIGHTS_INDEX).is_file() else {}
    model = model_from_config(
        folder.resolve().name,
        config,
        source,
        files=files,
        input_files={CONFIG: config_path, **index, **source.paths, **files},
        encode_text=text_encoder(files, folder),
    )
    return replace(model, folder=folder)


def model_from_config(
    name: str,
    config: Mapping[str, Any],
    source: TensorSource,
    *,
    files: Mapping[str, Path | bytes],
    input_files: Mapping[str, Path],
    encode_text: TextEncoder | None,
) -> Model:
    """Make a Model of what a Hugging Face folder holds, wherever it comes from: for loader plugins.

    config: what config.json says; source: its tensors under names that transformers' from_pretrained would accept;
    files, input_files, encode_text: see Model. Raises InputError QC-INPUT-011 to 017, 023 to 025.
    """
    skeleton.refuse_empty_layers(config, len(source.tensors))
    fitted = _fit(_with_dtype(skeleton.checked_config(config), source), source)
    module, task = fitted.module, fitted.task
    model = Model(
        name=name,
        task=task,
        module=module,
        source=fitted.source,
        blocks=structure.repeated_blocks(module, task),
        tied=fitted.tied,
        unplaced=fitted.unplaced,
        output_head=structure.output_head(module, task),
        input_names=structure.input_names(module, task),
        encode_text=encode_text,
        config={**fitted.config, "architectures": [type(module).__name__]},
        files=files,
        input_files=input_files,
    )
    if encode_text is not None:
        encode_text.check_ids(vocabulary_size(model))
    return model


def _with_dtype(config: Mapping[str, Any], source: TensorSource) -> Mapping[str, Any]:
    """`config` with the dtype of the first floats, which transformers takes where none is named: in the output, the first
    may be scales."""
    if config.get("dtype") or config.get("torch_dtype"):
        return config
    dtypes = (info.dtype for _, info in sorted(source.tensors.items()))
    first = next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)
    return {**config, "dtype": str(first).removeprefix("torch.")}


@dataclass(frozen=True, slots=True, eq=False)
class _Fitted:
    """A skeleton and the stored tensors that fill it completely. unplaced: see Model."""

    config: Mapping[str, Any]
    module: PreTrainedModel
    task: Task
    source: RenamedSource
    tied: Mapping[str, str]
    unplaced: Mapping[str, str]


def _fit(config: Mapping[str, Any], source: TensorSource) -> _Fitted:
    """Build what a checked config describes and find its tensors; what the config says too much or too little is mended."""
    if not config.get("architectures"):
        return _fit_by_weights(config, source)
    module, task = skeleton.build_skeleton(config)
    stored = names.module_names(module, source)
    tied, apart = names.resolve_ties(module, source, stored)
    if apart and skeleton.can_untie(config):
        log.warning("config.json ties weights that are stored with different values: they are kept apart")
        return _fit({**config, "tie_word_embeddings": False}, source)
    missing = names.missing_names(module, stored, tied)
    if not task.generates and _only_head(module, missing):
        # Many sentence encoders name the class that they were trained as, but were saved without its head.
        base = skeleton.base_class_name(config["model_type"])
        log.warning("the checkpoint holds no complete head for %s: loaded as %s", type(module).__name__, base)
        return _fit({**config, "architectures": [base]}, source)
    computed = computed_tensors(module, missing)
    missing = [name for name in missing if name not in computed]
    renamed = RenamedSource(source, stored, computed)
    unplaced = unplaced_tensors(module, renamed, missing)
    names.refuse_missing(module, missing)
    names.check_shapes(module, renamed)
    _fill_buffers(module, renamed)
    return _Fitted(config, module.requires_grad_(False), task, renamed, tied, unplaced)


def _fit_by_weights(config: Mapping[str, Any], source: TensorSource) -> _Fitted:
    """`_fit` with the first class that the weights complete, and that has a place for all of them."""
    probable = skeleton.probable_classes(config)
    for name in probable:
        try:
            fitted = _fit({**config, "architectures": [name]}, source)
        except InputError as error:
            if error.code not in WRONG_CLASS:
                raise
            continue
        log.warning("config.json names no architectures: the weights are those of %s", type(fitted.module).__name__)
        return fitted
    tried = " or ".join(probable) or "a class that transformers maps its model_type to"
    raise InputError(
        "QC-INPUT-011",
        f"config.json names no architectures, and the weights are not those of {tried}",
        hint="set architectures to the class of transformers that the weights were saved from",
    )


def _only_head(module: PreTrainedModel, missing: list[str]) -> bool:
    """Return whether all that is missing belongs to the head on top of the base model."""
    prefix = f"{module.base_model_prefix}."
    return bool(missing) and module.base_model is not module and not any(name.startswith(prefix) for name in missing)


def _fill_buffers(module: PreTrainedModel, source: RenamedSource) -> None:
    """Buffers are real from the start: take the stored values of those that belong to the checkpoint."""
    persistent = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in persistent and name in source.tensors:
            buffer.copy_(source.read(name))
