"""The samples that quantizers are tried on: tiny linears with inputs, and the two calls that qconvert makes.

All numbers come from generators with fixed seeds; the global random state is neither read nor changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from qconvert.errors import QConvertError
from qconvert.ir.layer import CalibrationStats, Layer, LayerKind, LinearGroup
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.host import contract
from qconvert.plugin.host.discovery import FAILURES, reason
from qconvert.plugin.observer import Observer
from qconvert.plugin.quantizer import Quantizer
from qconvert.plugin.smoothing import scaled
from qconvert.testing.failure import CheckFailure, place

# One of each kind that differs in arithmetic or storage; all of them can be planned.
SCHEMES = tuple(
    QuantScheme.parse(text)
    for text in (
        "int4-g32", "int4-g32-asym", "int4-channel", "int4-channel-asym", "int8-g32", "int8-channel", "int8-channel-asym",
        "int8-tensor", "int8-tensor-asym", "int8-channel-a8", "int8-channel-asym-a8", "int8-tensor-a8", "int8-tensor-asym-a8",
    )
)  # fmt: skip
# For quantizers that make them.
CODEBOOK_SCHEMES = tuple(map(QuantScheme.parse, ("nf4-g32", "nf4-g64", "fp4-g64", "nf4-g64-dq")))

# What tells two results apart.
FIELDS = (
    "q", "scale", "zero_point", "smoothing_scale", "outliers.columns", "outliers.weight",
    "nested_scale.q", "nested_scale.scale", "nested_scale.offset",
)  # fmt: skip


def schemes_of(quantizer: Quantizer) -> tuple[QuantScheme, ...]:
    """Return the quantizer's default scheme, then those of SCHEMES, and of CODEBOOK_SCHEMES, that it does not refuse."""
    known = (*SCHEMES, *CODEBOOK_SCHEMES) if quantizer.codebooks else SCHEMES
    accepted = (scheme for scheme in known if quantizer.refuses(scheme) is None)
    return tuple(dict.fromkeys((quantizer.default_scheme, *accepted)))


def normal(*shape: int, seed: int) -> Tensor:
    """Return standard normal float32 numbers, the same for every call with this seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, eq=False)
class Sample:
    """Linears that share an input.

    weights: each [out, in]. rows: [n, in], what the observers see.
    """

    name: str
    weights: tuple[Tensor, ...]
    rows: Tensor
    kind: LayerKind = "linear"

    def group(self, quantizer: Quantizer) -> LinearGroup:
        """Copies of the weights, with the statistics that the quantizer's own observers make of the rows."""
        stats = statistics(quantizer.observers, self.rows)
        layers = tuple(
            Layer(f"{self.name}.{index}", self.kind, weight.clone(), torch.linspace(-1, 1, len(weight)), stats)
            for index, weight in enumerate(self.weights)
        )
        return LinearGroup(layers, stats=stats)

    def fits(self, scheme: QuantScheme) -> bool:
        """Return whether the scheme's groups divide the width of the weights."""
        width = self.weights[0].shape[1]
        return width % scheme.group_size(width) == 0


@dataclass(frozen=True, eq=False)
class Outcome:
    """One layer before and after quantization.

    layer: as `quantize` got it, its weight scaled. rows: [n, in], what it then reads.
    weight: [out, in] as it was. tensor: with the smoothing scale, if any.
    """

    layer: Layer
    rows: Tensor
    weight: Tensor
    tensor: QuantizedTensor

    @property
    def place(self) -> str:
        """The layer, its shape and its scheme, for messages."""
        return place(self.layer, self.tensor.scheme)


def statistics(observers: tuple[type[Observer], ...], rows: Tensor) -> CalibrationStats | None:
    """Return what the observers make of rows [n, in] that all count alike; None without observers."""
    if not observers:
        return None
    values = {}
    for kind in observers:
        observer = kind()
        observer.update(rows.clone(), torch.ones(len(rows)))
        values[kind.name] = observer.finalize()
    return CalibrationStats(len(rows), values)


def quantized(quantizer: Quantizer, sample: Sample, scheme: QuantScheme) -> tuple[Outcome, ...]:
    """Quantize the layers of a sample as qconvert does where a smoothing scale can't be folded: `prepare`, the scale put into
    weights and statistics, `quantize`; both calls are held to their contract.

    Raises CheckFailure for what the contract refuses and for what the quantizer raises.
    """
    group = sample.group(quantizer)
    layer = group.layers[0]
    try:
        scale = None
        if sample.kind not in ("conv2d", "embedding"):  # their inputs have no factor per column
            scale = contract.prepare(quantizer, group, (scheme,) * len(group.layers)).smoothing_scale
        ready = group if scale is None else scaled(group, scale, quantizer.observers)
        outcomes = []
        for layer, weight in zip(ready.layers, sample.weights, strict=True):
            tensor = contract.quantize(quantizer, layer, scheme)
            if scale is not None:
                tensor = dataclasses.replace(tensor, smoothing_scale=scale)
            rows = sample.rows if scale is None else sample.rows / scale
            outcomes.append(Outcome(layer, rows, weight, tensor))
    except QConvertError as error:
        raise CheckFailure(f"{place(layer, scheme)}: {error.message}") from error
    return tuple(outcomes)


def every_outcome(quantizer: Quantizer, sample: Sample) -> Iterator[Outcome]:
    """Yield the outcomes of `quantized` with every scheme of the quantizer that fits the sample."""
    for scheme in schemes_of(quantizer):
        if sample.fits(scheme):
            yield from quantized(quantizer, sample, scheme)


def returned(
    quantizer: Quantizer, sample: Sample, scale_bits: int = 24
) -> Iterator[tuple[Layer, QuantScheme, QuantizedTensor]]:
    """Yield what `quantize` returns for each layer and scheme, held to nothing: the checks of the record do that one by one."""
    for scheme in schemes_of(quantizer):
        scheme = dataclasses.replace(scheme, scale_bits=scale_bits)
        if sample.fits(scheme):
            for layer in sample.group(quantizer).layers:
                try:
                    tensor = quantizer.quantize(layer, scheme)
                except FAILURES as error:
                    raise CheckFailure(f"{place(layer, scheme)}: {reason(error)}") from error
                yield layer, scheme, tensor


def difference(one: QuantizedTensor, other: QuantizedTensor) -> str | None:
    """Return where two results differ, "q in 3 of 3072 places, first at [0, 7]"; None if they are the same bytes."""
    for name in FIELDS:
        a, b = _field(one, name), _field(other, name)
        if a is None or b is None:
            if a is not b:
                return f"only one has {name}"
        elif a.shape != b.shape:
            return f"{name} is {list(a.shape)} and {list(b.shape)}"
        elif not torch.equal(a, b):
            places = (a != b).nonzero()
            return f"{name} differs in {len(places)} of {a.numel()} places, first at {places[0].tolist()}"
    return None


def _field(tensor: QuantizedTensor, name: str) -> Tensor | None:
    found: Any = tensor
    for attribute in name.split("."):
        found = getattr(found, attribute, None)
    return cast(Tensor | None, found)


@cache
def typical() -> Sample:
    """Return two linears of width 64; their inputs are correlated, and two columns are 30 times as large as the others."""
    rows = normal(192, 64, seed=1) @ (torch.eye(64) + 0.3 * normal(64, 64, seed=2) / 8)
    rows[:, [5, 40]] *= 30
    return Sample("typical", (normal(48, 64, seed=3) * 0.1, normal(16, 64, seed=4) * 0.1), rows)


def with_weight(name: str, weight: Tensor, kind: LayerKind = "linear") -> Sample:
    """Return one linear of weight [out, in] with correlated inputs."""
    width = weight.shape[1]
    rows = normal(96, width, seed=5) @ (torch.eye(width) + 0.3 * normal(width, width, seed=6) / width**0.5)
    return Sample(name, (weight,), rows, kind)
