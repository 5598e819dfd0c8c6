"""Modules without weights made from a config.json: of transformers' own classes only, no code of the checkpoint runs."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from typing import Any

import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from qconvert.errors import InputError, in_one_line
from qconvert.ir.task import CAUSAL_LM, ENCODER, SEQ2SEQ_LM, Task
from qconvert.load.structure import halves, stack_within

# Keys that make transformers import code of the checkpoint, or fetch attention and other kernels and run them.
CODE_KEYS = re.compile(
    r"auto_map|custom_pipelines|trust_remote_code|_?(attn|experts)_implementation\w*|(use|allow_all)_kernels|kernel_config"
)
# Keys that say that weights are stored in a quantized form.
QUANTIZED_KEYS = ("quantization_config", "compression_config")
# How forwards name what they take beside text.
OTHER_MEDIA = re.compile("pixel|image|video|visual|audio|input_features|input_values")
# Under which names configs count the layers of a stack.
LAYER_COUNTS = re.compile(r"(num_|n_)?((hidden|encoder|decoder)_)?layers?")

log = logging.getLogger("qconvert")


def checked_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` without the keys that would run code, which are named in a warning.

    Raises InputError: QC-INPUT-011 without a model_type that transformers knows, 012 if only the checkpoint's own code
    knows it, 013 if the weights are quantized already.
    """
    for key in QUANTIZED_KEYS:
        if config.get(key):
            method = config[key].get("quant_method") if isinstance(config[key], Mapping) else None
            raise InputError(
                "QC-INPUT-013",
                f"config.json has {key} (quant_method {method!a}): the source is quantized already",
                hint="give the float checkpoint that it was made from",
            )
    clean, dropped = _without_code_keys(config)
    model_type = clean.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        if "auto_map" in dropped:
            raise InputError(
                "QC-INPUT-012",
                f"config.json needs code of the checkpoint: key auto_map, model_type {model_type!a}. "
                "qconvert never runs such code",
                hint="use a model type that transformers has itself, or module:FACTORY with code that you trust",
            )
        raise InputError(
            "QC-INPUT-011",
            f"config.json: model_type {model_type!a} is unknown to transformers {transformers.__version__}",
            hint="check model_type; for a module of your own use module:FACTORY",
        )
    if dropped:
        log.warning("config.json: ignored %s; transformers' own %s is used", ", ".join(sorted(dropped)), model_type)
    return clean


def _without_code_keys(config: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    clean: dict[str, Any] = {}
    dropped: set[str] = set()
    for key, value in config.items():
        if CODE_KEYS.fullmatch(key):
            dropped.add(key)
            continue
        if isinstance(value, Mapping):
            value, inner = _without_code_keys(value)
            dropped |= inner
        clean[key] = value
    return clean, dropped


def build_skeleton(config: Mapping[str, Any]) -> tuple[PreTrainedModel, Task]:
    """Build the module that a checked config describes, in eval mode, and return it with its task.

    Parameters are on the meta device, buffers real; parameters that are computed and never trained need no gradient. Raises
    InputError: QC-INPUT-011 for values that the class does not take, 014 for kinds of models that are not converted.
    """
    try:
        parsed = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:  # each config class checks in its own way
        raise _bad_values(error) from error
    model_class = _model_class(config, parsed)
    if reason := _unsupported(model_class, parsed):
        raise _not_converted(model_class.__name__, reason)
    try:
        with init_empty_weights(include_buffers=False):
            module = model_class(parsed)
        module.tie_weights()  # moving parameters to meta one by one has untied them
    except Exception as error:  # sizes that do not go together, or that no memory can hold
        raise _bad_values(error) from error
    if experts := _experts(module):
        raise _not_converted(model_class.__name__, f"a mixture of experts ({experts})")
    task = _task(model_class)
    if task is CAUSAL_LM and _sees_later_tokens(module):
        reading = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config["model_type"]) or base_class_name(config["model_type"])
        raise InputError(
            "QC-INPUT-014",
            f"{model_class.__name__} has the head of a model that writes text, but its attention sees later tokens: is_decoder "
            "is not set in config.json",
            hint="set is_decoder to true if the model was trained to write text, and else architectures to the class that the "
            f"weights were trained in, e.g. {reading!a}",
        )
    if not task.generates and (rotary := _rotary_embedding(module)):
        reason = f"a model without a language model's head that rotates queries and keys ({rotary})"
        raise _not_converted(model_class.__name__, reason)
    if task.reads_source and not all(stack_within(module, half) for half in halves(module)):
        raise _not_converted(model_class.__name__, "an encoder-decoder without repeated blocks on both sides")
    return module.eval(), task


def _task(model_class: type[PreTrainedModel]) -> Task:
    if model_class.__name__ in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        return SEQ2SEQ_LM
    return CAUSAL_LM if model_class.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else ENCODER


def refuse_empty_layers(config: Mapping[str, Any], tensors: int) -> None:
    """Raise InputError QC-INPUT-015 where a config counts far more layers than there are tensors to fill them: building them
    alone could take hours. Ten times as many are far more, since layers may share their weights (ALBERT).
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            refuse_empty_layers(value, tensors)
        elif LAYER_COUNTS.fullmatch(key) and isinstance(value, int) and value > 10 * tensors:
            raise InputError(
                "QC-INPUT-015",
                f"config.json: {key} is {value}, far more layers than the checkpoint has tensors for",
                hint="compare config.json with the publisher's, and the weights",
            )


def can_untie(config: Mapping[str, Any]) -> bool:
    """Return whether a model can be told that its embedding and its head are two tensors. T5 can't: its class ties them, and
    keeps what is stored apart only while it loads.
    """
    untied = CONFIG_MAPPING[config["model_type"]].from_dict({**config, "tie_word_embeddings": False})
    return not getattr(untied, "tie_word_embeddings", False)


def _bad_values(error: Exception) -> InputError:
    return InputError(
        "QC-INPUT-011", f"config.json can't be used: {in_one_line(error)}", hint="compare it with the publisher's"
    )


def base_class_name(model_type: str) -> str:
    """Return the class that AutoModel uses: the model without a head."""
    name = MODEL_MAPPING_NAMES.get(model_type, "")
    return name if isinstance(name, str) else name[0]


def probable_classes(config: Mapping[str, Any]) -> list[str]:
    """Return the classes that a config of its model type most probably belongs to, where it names none; the first first."""
    kind = config["model_type"]
    masked, base = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind), base_class_name(kind)
    seq2seq, causal = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    is_encoder = masked and not seq2seq and not config.get("is_decoder")
    return [name for name in ((base, masked) if is_encoder else (seq2seq, causal, base)) if name]


def _model_class(config: Mapping[str, Any], parsed: Any) -> type[PreTrainedModel]:
    names = config.get("architectures") or probable_classes(config)
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found: Any = getattr(transformers, name, None) if name.isidentifier() else None
    is_model = inspect.isclass(found) and issubclass(found, PreTrainedModel)
    if not is_model or not isinstance(parsed, found.config_class):
        raise InputError(
            "QC-INPUT-011",
            f"config.json: architectures {names!a} is no class of transformers {transformers.__version__} "
            f"for model_type {config['model_type']!a}",
            hint=f"set it to the class that the weights were saved from, e.g. {probable_classes(config)[:1]}",
        )
    model_class: type[PreTrainedModel] = found
    return model_class


def _unsupported(model_class: type[PreTrainedModel], parsed: Any) -> str | None:
    if "decoder_input_ids" in inspect.signature(model_class.forward).parameters and not _task(model_class).reads_source:
        return "an encoder-decoder (sequence to sequence) model without a language model's head"
    half = parsed.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and _task(model_class) is CAUSAL_LM
    if half or getattr(parsed, "add_cross_attention", False):
        return "the decoder of an encoder-decoder alone"
    if model_class.__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        return "a model of multiple choice, where a row is several texts"
    if not _reads_text_alone(model_class):
        modalities = model_class.input_modalities
        kinds = modalities if isinstance(modalities, str) else ", ".join(modalities)
        return f"a model of {kinds} that reads {model_class.main_input_name}"
    if model_class._is_stateful:
        return "a recurrent model (state-space layers instead of a KV cache)"
    return None


def _reads_text_alone(model_class: type[PreTrainedModel]) -> bool:
    """Return whether token ids are all that a model takes.

    A family that sees or hears declares that for all its classes, its language models included (Gemma3ForCausalLM): of
    those the forward tells.
    """
    if model_class.main_input_name != "input_ids":
        return False
    if model_class.input_modalities in ("text", ["text"], ("text",)):
        return True
    taken = inspect.signature(model_class.forward).parameters
    return _task(model_class) is CAUSAL_LM and not any(map(OTHER_MEDIA.search, taken))


def _experts(module: nn.Module) -> str | None:
    """Return the name of the module that holds the experts of a mixture, None in other models."""
    names = {name: type(part).__name__ for name, part in module.named_modules() if name}
    named = (name for name in names if name.rpartition(".")[2] == "experts")
    return next(named, None) or next((name for name, kind in names.items() if re.search("Moe|MoE|Experts", kind)), None)


def _sees_later_tokens(module: nn.Module) -> bool:
    """Return whether attention goes both ways, as in an encoder: a causal head alone does not change that (BertLMHeadModel)."""
    causal = [bool(part.is_causal) for part in module.modules() if hasattr(part, "is_causal")]
    return bool(causal) and not any(causal)


def _rotary_embedding(module: nn.Module) -> str | None:
    """Return the name of the module that gives the rotation's angles, None in models with positions of other kinds. Only
    decoders' attention rotates by itself; torch's exporter emits RotaryEmbedding otherwise, and gives it angles of one row for
    any number of rows.
    """
    return next((name for name, _ in module.named_modules() if "rotary_emb" in name), None)


def _not_converted(architecture: str, found: str) -> InputError:
    return InputError(
        "QC-INPUT-014",
        f"{architecture} is {found}, which qconvert does not convert",
        hint="language models (decoders, encoder-decoders) and text encoders are converted; wrap other modules with "
        "module:FACTORY",
    )
