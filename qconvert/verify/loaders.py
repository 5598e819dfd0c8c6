"""Loads an output folder with transformers, as its users do."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from math import prod
from typing import cast

import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from compressed_tensors.compressors import decompress_module
from compressed_tensors.quantization import disable_quantization
from torch import Tensor, nn

from qconvert.execution import probes
from qconvert.execution.auto_class import auto_class
from qconvert.execution.modules import in_own_shape
from qconvert.execution.outputs import graph_outputs
from qconvert.execution.wide_rows import Rows, is_large, tiles
from qconvert.graph import pieces
from qconvert.ir.model import Model
from qconvert.ort import compare
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.storage.layout import has_codebook
from qconvert.supervision.memory import give_back
from qconvert.verify.parity import torch_outputs


def transformers_parity(artifact: ArtifactReader, expected: Sequence[tuple[Tensor, ...]]) -> float:
    """Return the largest relative difference of the folder loaded by transformers to torch on the dequantized weights.

    expected: `torch_outputs` on the dequantized weights.
    The folder is loaded as its card says, in the dtype that its config.json names. The weights that this gave are then
    compared, in float32 on both sides: they should be the dequantized ones, as a loader that knows nothing of outliers sees
    them, rounded to that dtype once. bitsandbytes itself dequantizes those that it holds, since its kernels would round
    activations, too.

    A model with more than WHOLE_BYTES of weights is loaded several times, a group of blocks each time and all else on the meta
    device, and its weights themselves are compared. With bitsandbytes, which takes no such devices, it is loaded once: it stays
    packed.
    """
    sizes = _float_bytes(artifact.model)
    if sum(sizes.values()) <= pieces.WHOLE_BYTES:
        return _outputs_difference(artifact, expected)
    if needs_bitsandbytes(artifact):
        return _weights_difference(artifact, sizes)
    return max(_weights_difference(artifact, units) for units in _groups(sizes))


def needs_bitsandbytes(artifact: ArtifactReader) -> bool:
    """Return whether transformers loads the folder with bitsandbytes."""
    return any(map(has_codebook, artifact.plan.layers.values()))


def _outputs_difference(artifact: ArtifactReader, expected: Sequence[tuple[Tensor, ...]]) -> float:
    model = artifact.model
    with redirect_stderr(StringIO()):  # compressed-tensors draws bars there, and has no switch for them
        loaded = _loaded(artifact)
        if needs_bitsandbytes(artifact):
            _replace_packed(loaded)
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


def _replace_packed(loaded: nn.Module) -> None:
    """Put linears with dequantized weights in the place of those that bitsandbytes holds packed."""
    for name, module in list(loaded.named_modules()):
        if _is_packed(getattr(module, "weight", None)):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(_dequantized(module.weight), requires_grad=False), module.bias
            loaded.set_submodule(name, plain)


def _is_packed(weight: Tensor | None) -> bool:
    return getattr(weight, "quant_state", None) is not None


def _dequantized(weight: Tensor) -> Tensor:
    # Here, since it imports bitsandbytes, which no other folder needs.
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return cast(Tensor, dequantize_bnb_weight(weight))


def _weights_difference(artifact: ArtifactReader, units: Collection[str]) -> float:
    """The largest relative difference of a weight to the dequantized one. units: blocks, "" for what lies outside them."""
    model = artifact.model
    # Devices are told by module, and the model itself is none of them: what hangs on it alone is left out.
    names = [name for name in model.parameter_shapes if "." in name and model.block_of(name) in units]
    devices = {"": "meta", **dict.fromkeys(model.blocks, "meta"), **{name.rpartition(".")[0]: "cpu" for name in names}}
    with redirect_stderr(StringIO()):
        loaded = _loaded(artifact, None if needs_bitsandbytes(artifact) else devices)
        error = 0.0
        for name in names:
            weight = _weight_of(loaded, name, model.module)
            error = max(error, _largest_difference(weight, artifact.open(name, with_outliers=False)))
    del loaded
    gc.collect()  # its modules and hooks refer to each other, and would be in memory until a collection comes
    give_back()
    return error


def _largest_difference(weight: Tensor, reference: Tensor | Rows) -> float:
    """As ort.compare.largest_difference, once the reference is rounded to the type of the weight; a large one in tiles."""
    parts = tiles(weight.shape) if is_large(weight.shape) else (slice(None),)
    difference = largest = 0.0
    for rows in parts:
        found, expected = weight[rows].float(), reference[rows].to(weight.dtype).float()
        if found.shape != expected.shape or not found.isfinite().all() or not expected.isfinite().all():
            return float("inf")
        difference = max(difference, float((found - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return difference / max(largest, torch.finfo(torch.float32).tiny)


def _loaded(artifact: ArtifactReader, devices: dict[str, str] | None = None) -> nn.Module:
    kind = getattr(transformers, auto_class(artifact.model))
    loaded: nn.Module = kind.from_pretrained(artifact.folder, local_files_only=True, device_map=devices)
    return loaded


def _weight_of(loaded: nn.Module, name: str, skeleton: nn.Module) -> Tensor:
    """A parameter as the model would compute with it, in the shape that the skeleton has."""
    owner, _, leaf = name.rpartition(".")
    module = loaded.get_submodule(owner)
    if hasattr(module, "_hf_hook"):
        _put_back(module)
    if leaf not in module._parameters:
        decompress_module(module)  # as the first call of the model does
    parameter = cast(Tensor, getattr(module, leaf))
    if _is_packed(parameter):
        return in_own_shape(skeleton.get_submodule(owner), _dequantized(parameter))
    return parameter.detach()


def _put_back(module: nn.Module) -> None:
    """Give a module its own tensors: where devices differ, accelerate keeps them in a hook, which gives them to each call."""
    hook = module._hf_hook
    kept = next(each.weights_map for each in getattr(hook, "hooks", [hook]) if getattr(each, "weights_map", None) is not None)
    for tensors in (module._parameters, module._buffers):
        for leaf in [leaf for leaf, value in tensors.items() if value is not None]:
            value = kept[leaf]
            tensors[leaf] = nn.Parameter(value, requires_grad=False) if tensors is module._parameters else value
    remove_hook_from_module(module)


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The units of a model in groups that take at most WHOLE_BYTES, or are a unit alone. sizes: see `_float_bytes`."""
    group: list[str] = []
    size = 0
    for unit, nbytes in sizes.items():
        if group and size + nbytes > pieces.WHOLE_BYTES:
            yield group
            group, size = [], 0
        group.append(unit)
        size += nbytes
    yield group


def _float_bytes(model: Model) -> dict[str, int]:
    """Bytes in float32 of the parameters of each unit: the blocks in their order, then ""."""
    parameters = {model.stored_name(name): shape for name, shape in model.parameter_shapes.items()}
    sizes = dict.fromkeys((*model.blocks, ""), 0)
    for name, shape in parameters.items():
        sizes[model.block_of(name)] += pieces.FLOAT32_BYTES * prod(shape)
    return sizes


def _compute_in_float32(loaded: nn.Module, skeleton: nn.Module) -> None:
    """Compare weights, not what half the width or int8 activations make of them."""
    nn.Module.float(loaded)  # transformers' own refuses models whose weights are packed
    loaded.apply(disable_quantization)  # of activations, where schemes are mixed
    stored = loaded.state_dict().keys()
    for name, buffer in skeleton.named_buffers():
        if name not in stored:  # computed by the class, for Gemma's embedding in the dtype of the model
            loaded.get_buffer(name).copy_(buffer)
