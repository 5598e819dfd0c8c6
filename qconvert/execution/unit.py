"""One unit of a model run again, with other weights: whether it still computes the same, and with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qconvert.execution.block_runner import BlockRunner
from qconvert.execution.modules import in_own_shape
from qconvert.execution.wide_rows import Rows
from qconvert.ir.lane import Lane
from qconvert.ir.layer import BlockSamples
from qconvert.ir.model import Model


def unit_index(model: Model, unit: str) -> int:
    """Return the position of a block; for "", which is what lies outside the blocks, the position beyond the last."""
    return model.blocks.index(unit) if unit else len(model.blocks)


def relative_change(model: Model, unit: str, lane: Lane, replaced: Mapping[str, Tensor | Rows], device: str = "cpu") -> float:
    """Return max |out' - out| / max |out| of a unit on one lane, in full float32; inf if anything is not finite.

    replaced: full parameter name -> tensor as in the module (Conv1D [in, out]), but kernels may be flattened; or its rows.
    """
    shapes = model.parameter_shapes
    unknown = [name for name in replaced if name not in shapes or model.block_of(name) != unit]
    if unknown:
        raise ValueError(f"{unknown} are no parameters of {unit!r}")

    def read(name: str) -> Tensor | Rows:
        if name not in replaced:
            return model.read(name)
        value = replaced[name]
        return value.reshape(shapes[name]) if isinstance(value, Tensor) else value

    runner, index = BlockRunner(model, device=device, lanes=[lane]), unit_index(model, unit)
    with runner.weights_of(unit):
        expected = runner.run_unit(index, lane)
    with runner.weights_of(unit, read):
        changed = runner.run_unit(index, lane)
    worst = 0.0
    for before, after in zip(expected, changed, strict=True):
        largest = max(_largest(before), torch.finfo(torch.float32).tiny)
        difference = _largest(after - before)
        worst = max(worst, difference / largest if math.isfinite(difference) else math.inf)
    return worst


def _largest(values: Tensor) -> float:
    """Return the largest magnitude, NaN if there is one, without a copy: logits may be large."""
    return float(torch.stack(values.aminmax()).abs().max())


class DifferentiableBlock:
    """A repeated block on its calibration samples, with gradients.

    targets: per batch what the float block puts out, [rows, tokens, hidden].
    importance: per batch how much a squared error counts at each token, [rows, tokens]; 0 at padding.
    """

    def __init__(self, model: Model, unit: str, samples: BlockSamples, device: str = "cpu") -> None:
        self._runner = BlockRunner(model, device=device)
        self._index, self._samples = unit_index(model, unit), samples

    @property
    def targets(self) -> Sequence[Tensor]:
        """Per batch the output of the float block, [rows, tokens, hidden]."""
        return self._samples.targets

    @property
    def importance(self) -> Sequence[Tensor]:
        """Per batch the weight of a squared error at each token, [rows, tokens]."""
        return self._samples.importance

    @contextmanager
    def running(self, fixed: Mapping[str, Tensor]) -> Iterator[Callable[[int, Mapping[str, Tensor]], Tensor]]:
        """Give, within the context, a function from a batch's number and the weights [out, in] of some layers, by layer name,
        to the block's output; gradients flow to the weights.

        fixed: tensors that differ from the source, by full name.
        """
        model, device = self._runner.model, self._runner.device

        def read(name: str) -> Tensor:
            return fixed[name] if name in fixed else model.read(name)

        with self._runner.differentiable(self._index, read) as call:

            def forward(batch: int, weights: Mapping[str, Tensor]) -> Tensor:
                parameters = {
                    f"{name}.weight": in_own_shape(model.module.get_submodule(name), weight).to(device)
                    for name, weight in weights.items()
                }
                return call(self._samples.lanes[batch], parameters)

            yield forward
