"""A block with the smoothing scales that were found for it, its layers scaled one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from qconvert.execution.wide_rows import Rows, is_large
from qconvert.ir.layer import Block, Layer, Producer
from qconvert.plugin.observer import Observer
from qconvert.plugin.smoothing import divided

ALL = slice(None)


@dataclass(frozen=True)
class Folded:
    """A block whose scales were folded. No layer is scaled before it is asked for: all of them may be too much in float32.

    block: as it was before.
    scales: index of a group -> the scale [in] that is folded into its producer.
    kept: index of a group -> the scale [in] that did not fold, and stays in the graph.
    observers: of the quantizer; what they saw is divided by the scales.
    """

    block: Block
    scales: Mapping[int, Tensor]
    kept: Mapping[int, Tensor] = field(default_factory=dict)
    observers: tuple[type[Observer], ...] = ()

    @property
    def smoothing_scales(self) -> dict[str, Tensor]:
        """The scales that did not fold, by the names of the layers that they belong to."""
        return {layer.name: scale for index, scale in self.kept.items() for layer in self.block.groups[index].layers}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The float tensors that changed, by full name: those of producers, but for the weights of layers."""
        layers = {f"{layer.name}.weight" for layer in self.block.layers}
        tensors: dict[str, Tensor] = {}
        for index, scale in self.scales.items():
            producer = self._producer(index)
            factor = _producer_scale(producer, scale)
            for name in (f"{producer.name}.weight", f"{producer.name}.bias"):
                if name in self.block.tensors and name not in layers:
                    old = tensors.get(name, self.block.tensors[name]).float()
                    tensors[name] = old / (factor[:, None] if old.ndim == 2 else factor)
        return tensors

    def layers(self) -> Iterator[Layer]:
        """Yield the layers as the quantizer is given them: scaled, with divided statistics."""
        return (member.in_float() for member in self.members())

    def members(self) -> Iterator[FoldedLayer]:
        """Yield what `layers` does, not in float32 yet."""
        for index, group in enumerate(self.block.groups):
            scale = self.scales.get(index, self.kept.get(index))
            stats = group.stats if scale is None else divided(group.stats, scale, self.observers)
            for layer in group.layers:
                yield FoldedLayer(self, dataclasses.replace(layer, stats=stats))

    def scaled(self, layer: Layer, rows: slice | Tensor = ALL) -> Layer:
        """Return a layer of the block, or some rows of it, in float32, with the weight and bias that the scales make of it."""
        result = dataclasses.replace(layer, weight=layer.weight[rows]).in_float()
        for index, scale in (*self.scales.items(), *self.kept.items()):
            if layer.name in (member.name for member in self.block.groups[index].layers):
                result.weight.mul_(scale)
            if index in self.scales and self._producer(index).name == layer.name:
                result.weight.div_(_producer_scale(self._producer(index), scale)[rows, None])
        bias = self.tensors.get(f"{layer.name}.bias", result.bias)
        return dataclasses.replace(result, bias=bias if bias is None or rows is ALL else bias[rows])

    def parameters(self) -> Mapping[str, Tensor | Rows]:
        """Return every parameter that folding changes, in the module's own shape; weights of layers are made when they are
        read.
        """
        producers = {self._producer(index).name for index in self.scales}
        members = {layer.name for index in self.scales for layer in self.block.groups[index].layers}
        layers = {f"{layer.name}.weight": layer for layer in self.block.layers if layer.name in producers | members}
        return _Parameters(self, layers)

    def _producer(self, index: int) -> Producer:
        producer = self.block.groups[index].producer
        assert producer is not None
        return producer


@dataclass(frozen=True, eq=False)
class FoldedLayer:
    """A layer of a folded block, put into float32 when it is asked for. stored: as the source holds it, with its statistics."""

    folded: Folded
    stored: Layer

    def in_float(self, rows: slice | Tensor = ALL) -> Layer:
        """Return the layer, or some rows of it, as the quantizer is given it."""
        return self.folded.scaled(self.stored, rows)

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.stored.weight.shape

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Return rows of the weight."""
        return self.in_float(rows).weight


@dataclass(frozen=True, eq=False)
class _Parameters(Mapping[str, Tensor | Rows]):
    """The parameters that folding changes. layers: those that are the weights of layers, by full name."""

    folded: Folded
    layers: Mapping[str, Layer]

    def __getitem__(self, name: str) -> Tensor | Rows:
        if name not in self.layers:
            return self.folded.tensors[name]
        layer = self.layers[name]
        if layer.kind == "linear" and is_large(layer.weight.shape):
            return FoldedLayer(self.folded, layer)
        weight = self.folded.scaled(layer).weight
        return weight.T if layer.kind == "conv1d" else weight

    def __iter__(self) -> Iterator[str]:
        yield from (*self.folded.tensors, *self.layers)

    def __len__(self) -> int:
        return len(self.folded.tensors) + len(self.layers)


def _producer_scale(producer: Producer, scale: Tensor) -> Tensor:
    """Scale per producer channel; inputs that are copies of one channel were given one scale."""
    if producer.channels is None:
        return scale
    channels = torch.tensor(producer.channels)
    return torch.ones(int(channels.max()) + 1).scatter(0, channels, scale)
