"""Stored tensors that the model has no place for: each is known to be expendable, or an error names it."""

from __future__ import annotations

import re
from collections.abc import Collection

from transformers import PreTrainedModel

from qconvert.errors import InputError
from qconvert.ir.model import TensorInfo
from qconvert.load.names import RenamedSource, listed

# Pattern of a name -> why the model computes the same without it. Beside these, what transformers' own class leaves out.
EXPENDABLE = {
    r"(^|\.)rotary_emb\.(original_)?inv_freq$": "rotary frequencies, which config.json determines",
    r"(^|\.)position_ids$": "position numbers, which are counted anyway",
    r"\.masked_bias$": "the score of masked tokens, a constant",
    r"(^|\.)pooler\.dense\.(weight|bias)$": "a pooler, which this class does not have",
    r"^cls\.seq_relationship\.(weight|bias)$": "BERT's next-sentence head, which this class does not have",
}

# Part of a name -> what wraps a module so that its state dict has it.
WRAPPERS = {
    "module": "DataParallel, DistributedDataParallel or DeepSpeed",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
}

_ADAPTER = re.compile(r"^base_model\.model\.|\.(base_layer|modules_to_save|lora_\w+|ia3_l|hada_\w+|lokr_\w+|oft_\w+)(\.|$)")
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_format|weight_(packed|shape|scale\w*|zero_point|g_idx|global_scale)|"
    r"(input|output|[qkv])_(scale\w*|zero_point|global_scale)|weight\.(absmax|quant_map|quant_state\..+|nested_\w+))$"
)


def unplaced_tensors(module: PreTrainedModel, source: RenamedSource, missing: Collection[str]) -> dict[str, str]:
    """Return the tensors that the module has no place for, each with the reason why it computes the same without it.

    missing: the parameters that nothing is stored for, named beside the tensors that may be theirs.
    Raises InputError for a tensor that is not known to be expendable: QC-INPUT-023 where an adapter is not merged into the
    weights, 013 where they were quantized, 024 for all others.
    """
    places = module.state_dict().keys()
    reasons = {name: _expendable(module, name, info) for name, info in source.tensors.items() if name not in places}
    if refused := [name for name, reason in reasons.items() if reason is None]:
        raise _no_place(module, refused, len(source.stored), missing)
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _expendable(module: PreTrainedModel, name: str, info: TensorInfo) -> str | None:
    for pattern, reason in EXPENDABLE.items():
        if re.search(pattern, name):
            return reason
    if name.endswith(".bias") and len(info.shape) == 4 and info.shape[:2] == (1, 1):  # GPT-2 and its kin stored it
        return "a causal mask"
    if any(re.search(pattern, name) for pattern in module._keys_to_ignore_on_load_unexpected or ()):
        return f"{type(module).__name__} of transformers leaves it out"
    return None


def _no_place(module: PreTrainedModel, names: list[str], stored: int, missing: Collection[str]) -> InputError:
    """Return the error for tensors without a place, which says of what kind they are as far as their names tell."""
    model = type(module).__name__
    if adapter := [name for name in names if _ADAPTER.search(name)]:
        return InputError(
            "QC-INPUT-023",
            f"the weights hold an adapter of peft that is not merged into them: {_some(adapter)}",
            hint="load them with peft, call merge_and_unload(), and save what that returns with save_pretrained(FOLDER)",
        )
    if quantized := [name for name in names if _QUANTIZED.search(name)]:
        return InputError(
            "QC-INPUT-013",
            f"{model} has no place for {len(quantized)} tensors such as a quantizer stores: {_some(quantized)}",
            hint="give the float checkpoint; if the weights beside them are float, remove these tensors from the file",
        )
    if wrappers := _wrappers(module, names):
        left = ", ".join(f"{part!a} ({WRAPPERS.get(part, 'a module that holds the model')})" for part in wrappers)
        return InputError(
            "QC-INPUT-024",
            f"the tensors are named by what {model} was wrapped in, {left}: {_some(names)}",
            hint="save the state dict of the module inside, or rename the tensors without that part",
        )
    lacking = f", and lacks {len(missing)} of its own: {_some(missing)}" if missing else ""
    return InputError(
        "QC-INPUT-024",
        f"{model} has no place for {len(names)} of the {stored} stored tensors: {_some(names)}{lacking}",
        hint="config.json is of another model: check model_type, architectures and the number of layers; "
        "a tensor that nobody needs has to be removed from the file",
    )


def _wrappers(module: PreTrainedModel, names: list[str]) -> list[str]:
    """The parts that make all the names the module's own when they are taken out, [] if none do."""
    places = module.state_dict().keys()
    parts = [part for part in WRAPPERS if any(part in name.split(".") for name in names)] or [names[0].split(".")[0]]
    bare = [".".join(part for part in name.split(".") if part not in parts) for name in names]
    return parts if all(name in places for name in bare) else []


def _some(names: Collection[str]) -> str:
    return listed([ascii(name) for name in names])
