"""The entry of config.json that makes transformers load layers with codebooks, as Linear4bit of bitsandbytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from qconvert.execution.modules import layer_kind
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan


def bitsandbytes_config(model: Model, plan: Plan) -> dict[str, Any]:
    """Return `quantization_config` for a plan whose layers are all of one codebook (storage/bitsandbytes.py)."""
    scheme = next(iter(plan.layers.values())).scheme
    linears = [
        name for name, module in model.module.named_modules() if isinstance(module, nn.Linear) or layer_kind(module) == "conv1d"
    ]
    prefix = f"{getattr(model.module, 'base_model_prefix', '')}."
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": scheme.format.name,
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "bnb_4bit_compute_dtype": str(model.loaded_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        # Also where nothing is skipped: without a list, transformers skips the output head.
        "llm_int8_skip_modules": skipped([name for name in linears if plan.layer_of(name) is None], tuple(plan.layers), prefix),
    }


def skipped(floats: Sequence[str], quantized: Sequence[str], prefix: str) -> list[str]:
    """Return the patterns by which transformers leaves modules alone, and no quantized one.

    The same folder may be loaded with and without a head: `model.layers.0.mlp` is `layers.0.mlp` in the bare model, and a
    pattern has to hold for both.

    prefix: what the model class puts before the names of the bare model, "model.".
    """
    names = {each for name in quantized for each in (name, name.removeprefix(prefix))}
    found = []
    for name in floats:
        bare = name.removeprefix(prefix)
        # Other readers know no more than names, so that these come first; but the end of a name is matched, too.
        plain = not any(_matches(bare, each) for each in names)
        found.append(bare if plain else rf"^({re.escape(prefix)})?{re.escape(bare)}$")
    return found


def _matches(pattern: str, name: str) -> bool:
    """Return whether transformers takes a module for one that a pattern names (quantizers_utils.should_convert_module)."""
    return re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) is not None or name.endswith(pattern)
