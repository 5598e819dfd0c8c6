"""The words of recipes and of the command line, as plain data: `--help` is made of them, so nothing is imported."""

from __future__ import annotations

from typing import Any, Literal

TargetName = Literal["cpu", "cuda"]
HalfType = Literal["float16", "bfloat16"]
Layout = Literal["transformers", "onnx"]
Logits = Literal["all", "last"]
Prefill = Literal["int8", "same"]
KVCache = Literal["float", "int8"]
Preset = Literal["fast", "balanced", "best", "int8"]
Metric = Literal[
    "kl", "kl_decode", "top1", "perplexity", "cosine", "max_abs", "ratio", "speedup", "weights_bytes", "average_bits"
]

# What a preset sets where the recipe doesn't; chosen by measurement (docs/quantizers.md).
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"quantizer": "per-channel", "scheme": "int4-g32-asym", "options": {"clip": "mse"}},
    "balanced": {"quantizer": "awq", "scheme": "int4-g32-asym"},
    "best": {"quantizer": "gptq", "scheme": "int4-g32-asym", "sequential": True, "tuning": {"steps": 20}},
    "int8": {"quantizer": "smoothquant", "scheme": "int8-channel-a8", "options": {"max_outliers": 16}},
}
PLUGIN_SECONDS = 600  # what one call of a plugin may take, unless it is said
TIMING_SECONDS = 8  # what the timings of a verification may take on each target, unless it is said

# The name that stands for "decide the schemes", and the quantizer that then does the work.
AUTO, AUTO_QUANTIZER = "auto", "gptq"

# The name that stands for "quantize nothing, and store floats of half the width", and the type that is then meant without a
# scheme.
CAST = "cast"
CAST_SCHEME: HalfType = "float16"

# The name that stands for "the codes are those that training has settled on".
TRAINED = "trained"

# The tuner of blocks that a recipe means without naming one; its options are written beside its name.
TUNER = "signround"

# The estimator that chooses the ranges of activations where a recipe names none.
RANGES = "mse"
