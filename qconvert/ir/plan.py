"""Plan: what a run will do, known from the headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch

from qconvert.ir.artifact import WEIGHTS
from qconvert.ir.decision import Assignment, KeptFloat
from qconvert.ir.double_quant import BLOCK, NUMBERS
from qconvert.ir.layer import LayerKind
from qconvert.ir.layer_form import LayerForm
from qconvert.ir.model import TensorInfo
from qconvert.ir.quant_state import quant_state, state_suffix
from qconvert.ir.scheme import Activations, Cast, QuantScheme
from qconvert.vocabulary import KVCache, Prefill


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer that will be quantized, and how.

    out_features, in_features: of the weight after transposing (Conv1D) or flattening (Conv2d).
    weight_read: whether the model's own code looks at the weight, beside calling the layer.
    reason: why it has not the scheme that was asked for; None where it has.
    dtype: what loaders of bitsandbytes' layout dequantize the weight to.
    """

    name: str
    kind: LayerKind
    out_features: int
    in_features: int
    scheme: QuantScheme
    weight_read: bool = False
    reason: str | None = None
    dtype: torch.dtype = torch.float32

    @property
    def form(self) -> LayerForm:
        """The form that the layer is quantized to."""
        return LayerForm.of(self.kind, self.scheme)

    @property
    def disk_tensors(self) -> dict[str, TensorInfo]:
        """The tensors that the files of weights hold for the layer, in compressed-tensors' layout or, of codebooks, that of
        bitsandbytes, by their suffix.
        """
        if self.form is LayerForm.CODEBOOK_WEIGHTS:
            return self._codebook_tensors()
        scheme, out, width = self.scheme, self.out_features, self.in_features
        groups = width // scheme.group_size(width)
        scale = TensorInfo(scheme.scale_dtype, (out, groups))
        if not self.form.is_packed:
            tensors = {"weight": TensorInfo(torch.int8, (out, width)), "weight_scale": scale}
            if not scheme.symmetric:
                tensors["weight_zero_point"] = TensorInfo(torch.int8, (out, groups))
            return tensors
        tensors = {
            "weight_packed": TensorInfo(torch.int32, (out, -(-width * scheme.bits // 32))),
            "weight_scale": scale,
            "weight_shape": TensorInfo(torch.int64, (2,)),
        }
        if not scheme.symmetric:
            tensors["weight_zero_point"] = TensorInfo(torch.int32, (-(-out * scheme.bits // 32), groups))
        return tensors

    def _codebook_tensors(self) -> dict[str, TensorInfo]:
        scheme, shape = self.scheme, (self.out_features, self.in_features)
        count = prod(shape)
        scales = count // scheme.group_size(self.in_features)
        tensors = {
            "weight": TensorInfo(torch.uint8, (count * scheme.bits // 8, 1)),
            "weight.absmax": TensorInfo(torch.uint8 if scheme.double_quant else torch.float32, (scales,)),
            "weight.quant_map": TensorInfo(torch.float32, (2**scheme.bits,)),
        }
        if scheme.double_quant:
            tensors["weight.nested_absmax"] = TensorInfo(torch.float32, (-(-scales // BLOCK),))
            tensors["weight.nested_quant_map"] = TensorInfo(torch.float32, (NUMBERS,))
        state = TensorInfo(torch.uint8, (len(quant_state(scheme, shape, self.dtype)),))
        return tensors | {state_suffix(scheme.format): state}

    @property
    def nbytes(self) -> int:
        """The bytes that the layer takes in the files of weights."""
        return sum(info.nbytes for info in self.disk_tensors.values())


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a process takes that runs an artifact on the CPU.

    loaded_bytes: resident memory once the graphs are loaded, an estimate of report.json's loaded_bytes.
    loading_bytes: the most that it takes meanwhile, where weights are derived then; None where there are none.
    deriving_seconds: how long one core then works on them.
    cache_bytes_per_token: of keys and values, for each token of a row; None for what has no cache, and for encoder-decoders.
    context_length: tokens that a decoder has positions for; None where its config does not say.
    """

    loaded_bytes: int
    cache_bytes_per_token: int | None = None
    context_length: int | None = None
    loading_bytes: int | None = None
    deriving_seconds: float | None = None

    @property
    def cache_bytes(self) -> int | None:
        """The cache of one row that fills the context."""
        if self.cache_bytes_per_token is None or self.context_length is None:
            return None
        return self.cache_bytes_per_token * self.context_length


@dataclass(frozen=True, slots=True)
class Plan:
    """The fate of every tensor of a model: quantized by a scheme, or kept in float for a reason.

    scheme: the scheme of the layers that no rule names, or the float type that everything is cast to.
    layers: by name, in the model's order.
    kept_float: modules that stay as they are, each with the reason.
    calibrated: whether calibration data is needed.
    shared: output head -> the embedding of `layers` whose tensor it reads too.
    weights_bytes: exact size of the tensors in the files of weights (a scale beyond float16's range adds two bytes).
    peaks: estimate of the most memory that each stage holds at once, by its name.
    targets: where the artifact is to run.
    cuda_bytes: what the graph for CUDA needs in the sidecar: float tensors in its own type, scales per block, padded copies.
    assignment: where a budget has decided the schemes.
    unread: stored tensors that travel along though no graph computes with them -> the reason.
    weight_files: names of the files of weights, model.safetensors or its shards.
    cast: stored tensor -> the type that it is rounded to, where nothing is quantized but all floats become narrower.
    average_bits: per quantized weight, with scales and zero points; None where nothing is quantized.
    deployment: what running the artifact takes on the CPU; None where that is no target.
    prefill: how packed weights run prompts there.
    kv_cache: what a decoder's keys and values are kept in.
    """

    scheme: QuantScheme | Cast
    layers: Mapping[str, LayerPlan]
    kept_float: tuple[KeptFloat, ...]
    calibrated: bool
    weights_bytes: int
    peaks: Mapping[str, int]
    shared: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = ("cpu",)
    cuda_bytes: int = 0
    assignment: Assignment | None = None
    unread: Mapping[str, str] = field(default_factory=dict)
    weight_files: tuple[str, ...] = (WEIGHTS,)
    cast: Mapping[str, torch.dtype] = field(default_factory=dict)
    average_bits: float | None = None
    deployment: Deployment | None = None
    prefill: Prefill = "same"
    kv_cache: KVCache = "float"

    @property
    def peak_bytes(self) -> int:
        """The most memory that any stage holds at once."""
        return max(self.peaks.values(), default=0)

    @property
    def is_static(self) -> bool:
        """Whether any layer has activations whose range calibration finds."""
        return any(layer.scheme.is_static for layer in self.layers.values())

    @property
    def activations(self) -> Activations | None:
        """How static activations are quantized, which is alike in all layers that have some; None where none has."""
        return next((layer.scheme.activations for layer in self.layers.values() if layer.scheme.is_static), None)

    def is_static_layer(self, name: str) -> bool:
        """Return whether the module `name` reads codes of a range that calibration finds."""
        return self.form_of(name).is_static

    def layer_of(self, name: str) -> LayerPlan | None:
        """Return the planned layer that the module `name` computes with, None where it stays float."""
        return self.layers.get(self.shared.get(name, name))

    def form_of(self, name: str) -> LayerForm:
        """Return the form that the module `name` is quantized to."""
        layer = self.layer_of(name)
        if layer is None:
            return LayerForm.FLOAT
        return layer.form if layer.name == name else layer.form.as_product
