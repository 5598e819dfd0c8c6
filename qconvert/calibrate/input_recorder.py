"""Observers on the inputs of a unit's layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qconvert.calibrate.importance import importance_of
from qconvert.calibrate.layers import Layers
from qconvert.execution.block_runner import StopForward
from qconvert.ir.finite import all_finite, not_finite
from qconvert.ir.layer import CalibrationStats
from qconvert.ir.model import Model
from qconvert.ir.template import InputGroup
from qconvert.plugin.host import contract
from qconvert.plugin.observer import Observer


class InputRecorder:
    """Observers on the first layer of every group of a unit; what one batch shows them is kept until its output is known.

    Statistics are accumulated per chunk, what one batch brings to one call of a layer, and merged in the order of the chunks:
    they do not depend on where the chunks were run.

    mask: [rows, tokens] bool, False at padding; None where nothing is padded. Of the batch that runs; a decoder's tokens
        are padded as its source is.
    """

    def __init__(self, model: Model, layers: Layers, groups: Sequence[InputGroup], observers: Sequence[type[Observer]]) -> None:
        self.mask: Tensor | None = None
        self.model = model
        self.layers = layers
        self.groups = groups
        self.kinds = observers
        self.observers: list[list[Observer]] = [[observer() for observer in observers] for _ in groups]
        self.rows = [0] * len(groups)
        self._seen: list[tuple[int, Tensor]] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch what goes into the layers within the context."""
        hooks = [
            self.model.module.get_submodule(group.layers[0]).register_forward_pre_hook(partial(self._see, index))
            for index, group in enumerate(self.groups)
            if not self._is_embedding(group)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self.groups[index].layers[0]
        self._seen.append((index, _patches(module, args[0]) if self.layers[name].kind == "conv2d" else args[0]))
        if name == self.model.output_head:  # nothing comes after the head, and its logits are expensive
            raise StopForward

    def observe(self, output: Tensor | None) -> None:
        """Show the observers what the batch that has run brought to them.

        output: hidden state [rows, tokens, hidden] that the block made of it; None outside the blocks.
        """
        importance = torch.empty(0) if output is None else importance_of(output)
        for index, value in self._seen:
            rows = self._token_rows(value).float()
            if not len(rows):
                continue
            name = self.groups[index].layers[0]
            if not all_finite(rows):
                raise not_finite(f"goes into {name!r} during calibration")
            self.rows[index] += len(rows)
            fits = value.shape[:-1] == importance.shape
            weights = self._token_rows(importance[..., None])[:, 0] if fits else rows.new_ones(len(rows))
            for observer, kind in zip(self.observers[index], self.kinds, strict=True):
                chunk = kind()
                contract.update(chunk, rows, weights, name)
                contract.merge(observer, chunk, name)
        self._seen.clear()

    def _token_rows(self, value: Tensor) -> Tensor:
        """[..., in] -> [n, in], padding left out where the leading axes are those of the mask."""
        if self.mask is not None and value.dim() == 3 and value.shape[:2] == self.mask.shape:
            return value[self.mask]
        return value.reshape(-1, value.shape[-1])

    def _is_embedding(self, group: InputGroup) -> bool:
        """Return whether a layer is an embedding, which reads indices: there is nothing to observe in them."""
        return self.layers[group.layers[0]].kind == "embedding"

    def finalize(self) -> list[CalibrationStats | None]:
        """Return the statistics of each group; None for embeddings, and without values where no row was seen."""
        return [
            None
            if self._is_embedding(group)
            else CalibrationStats(
                rows, {each.name: contract.finalize(each, group.layers[0]) for each in observers} if rows else {}, group.made_by
            )
            for group, rows, observers in zip(self.groups, self.rows, self.observers, strict=True)
        ]


def _patches(module: nn.Module, images: Tensor) -> Tensor:
    """Return the patches that a Conv2d multiplies its flattened kernels with: [n, in/groups * kh * kw]."""
    assert isinstance(module, nn.Conv2d)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(images, module._reversed_padding_repeated_twice, mode=mode)  # "same" worked out by torch
    columns = nn.functional.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
    per_group = columns.reshape(len(images), module.groups, -1, columns.shape[-1])
    return per_group.transpose(2, 3).flatten(0, 2)
