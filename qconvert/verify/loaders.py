"""Loads an output folder with transformers, as its users do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO

import torch
import transformers
from compressed_tensors.quantization import disable_quantization
from torch import Tensor, nn

from qconvert.execution import probes
from qconvert.execution.auto_class import auto_class
from qconvert.execution.outputs import graph_outputs
from qconvert.ort import compare
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.verify.parity import torch_outputs


def transformers_parity(artifact: ArtifactReader, expected: Sequence[tuple[Tensor, ...]]) -> float:
    """Return the largest relative difference of the folder loaded by transformers to torch on the dequantized weights.

    expected: `torch_outputs` on the dequantized weights.
    The folder is loaded as its card says, in the dtype that its config.json names. The weights that this gave are then
    compared, in float32 on both sides: they should be the dequantized ones, as a loader that knows nothing of outliers sees
    them, rounded to that dtype once.
    """
    model = artifact.model
    with redirect_stderr(StringIO()):  # compressed-tensors draws bars there, and has no switch for them
        loaded = getattr(transformers, auto_class(model)).from_pretrained(artifact.folder, local_files_only=True)
        # Weights that are still packed, or int8, are dequantized by the first call, in float32.
        dtypes = {
            name: part.dtype for name, part in loaded.named_parameters(remove_duplicate=False) if part.is_floating_point()
        }
        _compute_in_float32(loaded, model.module)
        found = [graph_outputs(model.task, loaded, inputs) for inputs in probes.probes(model)]

    if artifact.has_outliers or set(dtypes.values()) != {torch.float32}:
        expected = torch_outputs(model, lambda name: artifact.read_plain(name).to(dtypes.get(name, torch.float32)))
    return max(
        compare.largest_difference(a.numpy(), b.numpy())
        for outputs, reference in zip(found, expected, strict=True)
        for a, b in zip(outputs, reference, strict=True)
    )


def _compute_in_float32(loaded: nn.Module, skeleton: nn.Module) -> None:
    """Compare weights, not what half the width or int8 activations make of them."""
    nn.Module.float(loaded)  # transformers' own refuses models whose weights are packed
    loaded.apply(disable_quantization)  # of activations, where schemes are mixed
    stored = loaded.state_dict().keys()
    for name, buffer in skeleton.named_buffers():
        if name not in stored:  # computed by the class, for Gemma's embedding in the dtype of the model
            loaded.get_buffer(name).copy_(buffer)
