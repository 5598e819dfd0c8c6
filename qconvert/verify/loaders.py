"""Loads an output folder with transformers, the way its users will."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from qconvert.ir import agreement
from qconvert.ir.dequantized import Artifact
from qconvert.ir.forward import graph_outputs


def transformers_parity(artifact: Artifact, expected: Sequence[tuple[Tensor, ...]]) -> float:
    """Largest relative difference of the folder loaded by transformers to torch on the dequantized weights.

    expected: `torch_outputs` on the weights as a loader that knows nothing of outliers sees them.
    Activations are kept in float on both sides: where the folder asks for int8 activations, the loader is told to
    dequantize instead of simulating them.
    """
    errors: list[float] = []
    with redirect_stderr(StringIO()):  # compressed-tensors draws bars there, and has no switch for them
        loaded = _load(artifact)
        found = [graph_outputs(artifact.model.task, loaded, inputs) for inputs in agreement.probes(artifact.model)]
    for outputs, reference in zip(found, expected, strict=True):
        errors += [agreement.largest_difference(a.numpy(), b.numpy()) for a, b in zip(outputs, reference, strict=True)]
    return max(errors)


def _load(artifact: Artifact) -> Any:
    from transformers import AutoConfig, CompressedTensorsConfig

    config = AutoConfig.from_pretrained(artifact.folder, local_files_only=True)
    options: dict[str, Any] = {}
    groups = config.quantization_config["config_groups"].values()
    if any(group["input_activations"] for group in groups):
        quantization = CompressedTensorsConfig.from_dict(dict(config.quantization_config))
        quantization.dequantize = True
        options["quantization_config"] = quantization
    loaded = type(artifact.model.module).from_pretrained(  # type: ignore[attr-defined]
        artifact.folder, config=config, dtype=torch.float32, local_files_only=True, **options
    )
    return loaded.eval()
