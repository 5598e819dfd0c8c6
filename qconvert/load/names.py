"""Stored tensors under the names of the module: prefixes, legacy names, tied weights; and that none is missing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qconvert.errors import InputError
from qconvert.ir.model import TensorInfo, TensorSource

log = logging.getLogger("qconvert")


@dataclass(frozen=True, eq=False)
class RenamedSource:
    """A TensorSource under other names, completed by what no file holds.

    stored: name -> name in `inner`. Tensors of `inner` that are not in it are left out.
    computed: name -> tensor that is not stored (see qconvert.load.computed).
    """

    inner: TensorSource
    stored: Mapping[str, str]
    computed: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: Mapping[str, TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        stored = {name: self.inner.tensors[old] for name, old in self.stored.items()}
        computed = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in self.computed.items()}
        object.__setattr__(self, "tensors", {**stored, **computed})

    def read(self, name: str) -> Tensor:
        """Return the tensor under its name in the module, computed or stored."""
        return self.computed[name] if name in self.computed else self.inner.read(self.stored[name])


def module_names(module: PreTrainedModel, source: TensorSource) -> dict[str, str]:
    """Return the stored name of each tensor by its name in the module's state dict, matched as transformers loads it; tensors
    without a place keep their names.

    The base model's prefix may be absent or superfluous, LayerNorm's gamma and beta are old names. Raises InputError
    QC-INPUT-017 where loading means more than renaming (fused or merged tensors), or two tensors want one place.
    """
    transforms = get_model_conversion_mapping(module)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = module.state_dict()
    stored: dict[str, str] = {}
    for old in source.tensors:
        new, conversion = rename_source_key(old, renamings, converters, module.base_model_prefix, state)
        if conversion is not None:
            raise InputError(
                "QC-INPUT-017",
                f"tensor {old!a} is stored in a form that transformers converts while loading {type(module).__name__}",
                hint="load the model with transformers and call its save_pretrained(FOLDER, save_original_format=False)",
            )
        name = new if new in state else old
        if name in stored:
            raise InputError(
                "QC-INPUT-017",
                f"tensors {stored[name]!a} and {old!a} are both stored for {name!a}",
                hint="remove the one that does not belong to the checkpoint",
            )
        stored[name] = old
    return stored


def resolve_ties(module: PreTrainedModel, source: TensorSource, stored: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return which parameters share a stored tensor, as parameter -> the one that owns it.

    What repeats it is taken out of `stored`.

    An owner that is not stored takes over the tensor of one of its aliases. Second, the parameters that the config ties
    but that are stored with other values: they are not tied (as in transformers).
    """
    members: dict[str, list[str]] = {}
    for alias, owner in module.all_tied_weights_keys.items():
        members.setdefault(owner, [owner]).append(alias)
    tied: dict[str, str] = {}
    apart: list[str] = []
    for owner, names in members.items():
        present = [name for name in names if name in stored]
        if not present:
            continue  # found missing later
        content = stored[present[0]]
        others = [name for name in present[1:] if not _same(source, content, stored[name])]
        for name in names:
            if name not in others:
                stored.pop(name, None)
        stored[owner] = content
        tied |= dict.fromkeys((name for name in names[1:] if name not in others), owner)
        apart += others
    return tied, apart


def _same(source: TensorSource, first: str, second: str) -> bool:
    """Return whether two stored tensors are equal bit for bit (NaN included)."""
    if source.tensors[first] != source.tensors[second]:
        return False
    return torch.equal(*(source.read(name).reshape(-1).view(torch.uint8) for name in (first, second)))


def missing_names(module: PreTrainedModel, stored: Mapping[str, str], tied: Mapping[str, str]) -> list[str]:
    """Return the parameters and persistent buffers that nothing is stored for, in the module's order."""
    return [name for name in module.state_dict() if name not in stored and name not in tied]


def check_shapes(module: PreTrainedModel, source: RenamedSource) -> None:
    """Raise InputError QC-INPUT-016 naming the tensors whose shape or kind of number is not what the config says."""
    wrong = []
    for name, place in module.state_dict().items():
        if (info := source.tensors.get(name)) is None:
            continue
        if info.shape != tuple(place.shape):
            wrong.append(f"{source.stored[name]!a} is {list(info.shape)}, config.json says {list(place.shape)}")
        elif info.dtype.is_floating_point != place.dtype.is_floating_point:
            wrong.append(f"{source.stored[name]!a} is {info.dtype}, the model wants {place.dtype}")
    if wrong:
        raise InputError(
            "QC-INPUT-016",
            f"{len(wrong)} tensors do not fit {type(module).__name__}: {listed(wrong)}",
            hint="config.json and the weights are of different models: download both again",
        )


def refuse_missing(module: PreTrainedModel, missing: list[str]) -> None:
    """Raise InputError QC-INPUT-015 naming the parameters that nothing is stored for."""
    if missing:
        names = listed([ascii(name) for name in missing])
        raise InputError(
            "QC-INPUT-015",
            f"the checkpoint lacks {len(missing)} parameters of {type(module).__name__}: {names}",
            hint="check 'architectures' and the sizes in config.json, or download the checkpoint again",
        )


def listed(items: list[str]) -> str:
    """Return the first few items for a message, and how many more there are."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + more
