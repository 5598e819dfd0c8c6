"""Adapters as peft's save_pretrained writes them: LoRA on linear layers. peft itself is not needed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qconvert.errors import InputError
from qconvert.execution.adapter_branch import DOWN, UP
from qconvert.ir.finite import all_finite
from qconvert.load.folder import ADAPTER, ADAPTER_WEIGHTS, contained, read_json
from qconvert.load.safetensors import SafetensorsSource

WEIGHTS, PICKLED_WEIGHTS = ADAPTER_WEIGHTS
PREFIX = "base_model.model."

# What adapter_config.json may say without an effect on what a trained adapter computes.
SILENT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules"),
        *("fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core"),
        *("peft_version", "qalora_group_size", "revision", "target_modules", "task_type"),
    }
)
# What is read here.
READ = frozenset({"alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"})
# Ways to begin training that leave the weights of the base as they are; others train beside changed ones.
BEGINNINGS = ("gaussian", "eva", "orthogonal")

_MERGE = "in peft, call merge_and_unload() and save_pretrained(FOLDER), and convert that"
_AGAIN = "save it again with peft's save_pretrained"


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A LoRA adapter, opened: layer(x) + scaling * lora_B(lora_A(x)) for every layer that it has.

    files: config and weights by name.
    ranks, scalings: by the name of the layer's module.
    """

    files: Mapping[str, Path]
    source: SafetensorsSource
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]

    def matrices(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return lora_A [rank, in] and lora_B [out, rank] of a layer in float32, without the scaling."""
        return self.source.read(tensor_name(layer, DOWN)).float(), self.source.read(tensor_name(layer, UP)).float()


def tensor_name(layer: str, part: str) -> str:
    """Return what a file of peft calls a matrix of a layer. part: lora_A or lora_B."""
    return f"{PREFIX}{layer}.{part}.weight"


def open_adapter(folder: Path) -> Adapter:
    """Open the adapter in a folder: its config, the headers of its weights, and whether these are finite.

    Raises InputError QC-ADAPTER-001 for what is missing, pickled or unreadable, 002 for an adapter that computes anything
    but plain LoRA, 003 for half a branch, or a rank that the config does not give, 004 for numbers that are not finite;
    QC-INPUT-004 to 009 for damaged safetensors and links out of the folder.
    """
    config = _Config.read(folder)
    files = {ADAPTER: contained(folder, ADAPTER), WEIGHTS: _weights(folder)}
    source = SafetensorsSource({WEIGHTS: files[WEIGHTS]})
    layers = dict.fromkeys(_layer_of(name, folder) for name in source.tensors)
    if not layers:
        raise InputError("QC-ADAPTER-001", f"{files[WEIGHTS]} holds no tensor", hint=_AGAIN)
    for layer in layers:
        _check_shapes(layer, source, config.rank(layer), folder)
    for name in source.tensors:
        if not all_finite(source.read(name).float()):
            raise InputError(
                "QC-ADAPTER-004",
                f"{files[WEIGHTS]}: {name!a} holds NaN or infinity",
                hint="training diverged, or the file is damaged: take an earlier adapter",
            )
    return Adapter(
        files, source, {layer: config.rank(layer) for layer in layers}, {layer: config.scaling(layer) for layer in layers}
    )


def _weights(folder: Path) -> Path:
    if os.path.lexists(folder / WEIGHTS):
        return contained(folder, WEIGHTS)
    if os.path.lexists(folder / PICKLED_WEIGHTS):
        raise InputError(
            "QC-ADAPTER-001",
            f"{folder / PICKLED_WEIGHTS} is a pickle: opening it can run code",
            hint="in an environment that you trust, load it in peft and call save_pretrained, which writes safetensors",
        )
    raise InputError("QC-ADAPTER-001", f"{folder} has no {WEIGHTS}", hint="give the folder that peft's save_pretrained wrote")


def _layer_of(name: str, folder: Path) -> str:
    """The module that a tensor belongs to. What is no matrix of plain LoRA is part of what another kind computes with."""
    for part in (DOWN, UP):
        if name.startswith(PREFIX) and name.endswith(f".{part}.weight"):
            return name.removeprefix(PREFIX).removesuffix(f".{part}.weight")
    unchanged = "save it with save_embedding_layers=False, if that is what the base has; " if ".base_layer." in name else ""
    raise InputError(
        "QC-ADAPTER-002",
        f"{folder / WEIGHTS} holds {name!a}, and only {PREFIX}LAYER.{DOWN}.weight and {UP}.weight are taken: no embeddings, "
        "biases, magnitudes or whole layers",
        hint=f"{unchanged}train without that, or {_MERGE}",
    )


def _check_shapes(layer: str, source: SafetensorsSource, rank: int, folder: Path) -> None:
    for part, axis in ((DOWN, 0), (UP, 1)):
        name = tensor_name(layer, part)
        info = source.tensors.get(name)
        if info is None or not info.dtype.is_floating_point:
            found = "is missing" if info is None else f"is stored as {info.dtype}"
            raise InputError("QC-ADAPTER-003", f"{folder / WEIGHTS}: {name!a} {found}", hint=_AGAIN)
        if len(info.shape) != 2 or info.shape[axis] != rank:
            raise InputError(
                "QC-ADAPTER-003",
                f"{folder / WEIGHTS}: {name!a} is {list(info.shape)}, and {ADAPTER} gives it the rank {rank}",
                hint="put config and weights of one adapter together; of layers, only linear ones are taken",
            )


@dataclass(frozen=True, slots=True)
class _Config:
    """What adapter_config.json says of ranks and scalings; path: where it lies."""

    path: Path
    r: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    root: bool

    @staticmethod
    def read(folder: Path) -> _Config:
        path = contained(folder, ADAPTER)
        document = read_json(path, "QC-ADAPTER-001")
        _refuse_other_kinds(document, path)
        ranks, alphas = document.get("rank_pattern") or {}, document.get("alpha_pattern") or {}
        r: Any = document.get("r")
        alpha: Any = document.get("lora_alpha")
        if not (isinstance(ranks, dict) and all(map(_is_rank, (r, *ranks.values())))):
            raise _unreadable(path, "its ranks are not whole numbers above 0")
        if not (isinstance(alphas, dict) and all(map(_is_number, (alpha, *alphas.values())))):
            raise _unreadable(path, "its lora_alpha is no number")
        for pattern in (*ranks, *alphas):
            try:
                re.compile(pattern)
            except re.error as error:
                raise _unreadable(path, f"{pattern!a} is no regular expression: {error}") from error
        return _Config(path, r, alpha, ranks, alphas, bool(document.get("use_rslora")))

    def rank(self, layer: str) -> int:
        return self.ranks.get(_pattern_of(layer, self.ranks), self.r)

    def scaling(self, layer: str) -> float:
        """What lora_B is multiplied by: alpha / rank, of rsLoRA alpha / sqrt(rank)."""
        rank = self.rank(layer)
        alpha = self.alphas.get(_pattern_of(layer, self.alphas), self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)


def _pattern_of(layer: str, patterns: Iterable[str]) -> str:
    """The first pattern that a layer's name is, or ends with behind a dot, as peft looks it up; without one, that name."""
    return next((each for each in patterns if re.match(rf"(.*\.)?({each})$", layer)), layer)


def _refuse_other_kinds(document: Mapping[str, Any], path: Path) -> None:
    """What this knows nothing of may change what the adapter computes, unless it is unset."""
    begun = document.get("init_lora_weights", True)
    wrong = {
        "peft_type": document.get("peft_type") != "LORA",
        "bias": document.get("bias", "none") != "none",
        "init_lora_weights": not isinstance(begun, bool) and str(begun).lower() not in BEGINNINGS,
        **{key: bool(value) for key, value in document.items() if key not in SILENT | READ},
    }
    found = next((key for key, is_wrong in wrong.items() if is_wrong), None)
    if found is not None:
        raise InputError(
            "QC-ADAPTER-002",
            f"{path} says {found}: {document.get(found)!a}, and only plain LoRA on linear layers is taken, beside the weights "
            "that the base has",
            hint=f"train without that, or {_MERGE}",
        )


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError("QC-ADAPTER-001", f"{path} can't be used: {reason}", hint=_AGAIN)
