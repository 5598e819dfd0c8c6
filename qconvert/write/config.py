"""config.json: that of the source, plus what compressed-tensors' or bitsandbytes' readers must know of the weights."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from qconvert.errors import UsageError
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.scheme import Cast
from qconvert.storage.compressed_tensors import config_group, dequantizes_exactly
from qconvert.storage.disk import disk_errors
from qconvert.storage.layout import has_codebook, transformers_refuses
from qconvert.storage.stage import Stage
from qconvert.vocabulary import Layout
from qconvert.write.bitsandbytes_config import bitsandbytes_config

# An unknown quant_method or format only makes transformers warn and load random weights; a weight type that
# compressed-tensors doesn't know makes it raise, and show this text (measured with transformers 5.23).
ONNX_ONLY = "weights for onnx runtime: load the onnx files instead"


def write_config(model: Model, plan: Plan, stage: Stage, layout: Layout) -> None:
    """Write config.json for a model that came with one.

    Raises UsageError QC-WRITE-002 if the layers can't be loaded together from the transformers layout.
    """
    if model.config is None:
        return
    outliers = any(name.endswith(".outlier_columns") for name in stage.sidecar.tensors)
    config = copy.deepcopy(dict(model.config))
    for stale in ("quantization_config", "compression_config"):
        config.pop(stale, None)
    if isinstance(plan.scheme, Cast):
        _name_dtype(config, str(plan.scheme))
    if plan.layers:
        config["quantization_config"] = (
            quantization_config(model, plan, outliers=outliers) if layout == "transformers" else _refusal()
        )
    if any(f"{name}.weight" in model.tied and not layer.form.is_embedding for name, layer in plan.layers.items()):
        # A quantized head has its own weight; transformers would overwrite it with the embedding.
        config["tie_word_embeddings"] = False
    path = stage.folder / "config.json"
    with disk_errors(path):
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _name_dtype(config: dict[str, Any], dtype: str) -> None:
    """Say of which type the weights are, there and in the configurations of parts: transformers 4 calls it torch_dtype."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype


def quantization_config(model: Model, plan: Plan, *, outliers: bool) -> dict[str, Any]:
    """Return the entry of config.json that makes transformers and vLLM read the quantized layers.

    outliers: some layer keeps float columns in the sidecar, which these loaders know nothing of.
    """
    layers = plan.layers.values()
    reason = transformers_refuses(layers, outliers=outliers)
    if reason is not None:
        raise UsageError("QC-WRITE-002", reason, hint="use one scheme for all layers, or --layout onnx")
    if any(map(has_codebook, layers)):
        return bitsandbytes_config(model, plan)
    embedded = any(layer.form.is_embedding for layer in layers)
    classes = (nn.Linear, nn.Embedding) if embedded else (nn.Linear,)
    modules = [name for name, module in model.module.named_modules() if isinstance(module, classes)]
    target = _Targets(modules, getattr(model.module, "base_model_prefix", ""))
    groups: list[dict[str, Any]] = []
    targets: list[list[str]] = []
    for layer in layers:
        group = config_group(layer, outliers=outliers)
        if group not in groups:
            groups.append(group)
            targets.append([])
        targets[groups.index(group)].append(target(layer.name))
    if len(groups) == 1:
        targets = [[kind.__name__ for kind in classes]]
    formats = {group["format"] for group in groups}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{number}": {"targets": names, **group}
            for number, (names, group) in enumerate(zip(targets, groups, strict=True))
        },
        "ignore": [target(name) for name in modules if plan.layer_of(name) is None],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    if len(groups) == 1 and all(map(dequantizes_exactly, layers)):
        # Else layers stay packed until the model is called, and who calls its `forward`, as sentence-transformers does, finds
        # layers without a weight. With several groups, transformers would take the first for all.
        config["dequantize"] = True
    return config


class _Targets:
    """Module names for `targets` and `ignore`, as patterns that hold where another model class puts them elsewhere.

    The same folder may be loaded with and without a head: `model.layers.0.mlp` is `layers.0.mlp` in the bare model.
    An exact name would not match there, and the layer's weights would be random without an error.

    modules: names of all that compressed-tensors may target; a name without prefix that is the end of a second one is given
        exactly.
    prefix: what the model class puts before the names of the bare model, "model".
    """

    def __init__(self, modules: Iterable[str], prefix: str) -> None:
        self.prefix = prefix
        self.ends = Counter(
            ".".join(parts[start:]) for name in modules for parts in [name.split(".")] for start in range(len(parts))
        )

    def __call__(self, name: str) -> str:
        bare = name.removeprefix(f"{self.prefix}.")
        return name if "." not in name or self.ends[bare] > 1 else rf"re:(.*\.)?{re.escape(bare)}$"


def _refusal() -> dict[str, Any]:
    """A quantization_config that makes transformers fail with a reason, rather than load random weights."""
    weights = {"num_bits": 8, "type": ONNX_ONLY}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
