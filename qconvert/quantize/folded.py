"""A block with the smoothing scales that were found for it, its layers scaled one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from qconvert.ir.layer import Block, Layer, Producer
from qconvert.plugin.observer import Observer
from qconvert.plugin.smoothing import divided


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
        for index, group in enumerate(self.block.groups):
            scale = self.scales.get(index, self.kept.get(index))
            stats = group.stats if scale is None else divided(group.stats, scale, self.observers)
            for layer in group.layers:
                yield dataclasses.replace(self.scaled(layer), stats=stats)

    def scaled(self, layer: Layer) -> Layer:
        """Return a layer of the block in float32, with the weight and the bias that the scales make of its own."""
        result = layer.in_float()
        for index, scale in (*self.scales.items(), *self.kept.items()):
            if layer in self.block.groups[index].layers:
                result.weight.mul_(scale)
            if index in self.scales and self._producer(index).name == layer.name:
                result.weight.div_(_producer_scale(self._producer(index), scale)[:, None])
        return dataclasses.replace(result, bias=self.tensors.get(f"{layer.name}.bias", result.bias))

    def parameters(self) -> Mapping[str, Tensor]:
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
class _Parameters(Mapping[str, Tensor]):
    """The parameters that folding changes. layers: those that are the weights of layers, by full name."""

    folded: Folded
    layers: Mapping[str, Layer]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layers:
            return self.folded.tensors[name]
        layer = self.layers[name]
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
