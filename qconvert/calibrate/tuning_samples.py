"""What a block is tuned on: its inputs, the float block's outputs, and a way to run it with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

from torch import Tensor

from qconvert.calibrate.importance import importance_of, padding_mask
from qconvert.execution.block_runner import BlockRunner
from qconvert.execution.modules import in_own_shape


class FloatOutputs:
    """The outputs of the float blocks, beside a runner whose samples pass through the quantized ones.

    hidden: per batch the output of the block that was advanced last.
    """

    def __init__(self, runner: BlockRunner) -> None:
        self.runner = runner
        self.hidden: Sequence[Tensor] = ()

    def advance(self, index: int) -> None:
        """Run the float block `index`; where it begins a stack, on what the runner has before it."""
        stack_begins = index in accumulate((len(stack) for stack in self.runner.model.stacks), initial=0)
        inputs = self.runner.hidden if stack_begins else self.hidden
        with self.runner.weights_of(self.runner.model.blocks[index]):
            self.hidden = [self.runner.call_block(index, batch, hidden) for batch, hidden in enumerate(inputs)]


class TuningSamples:
    """`qconvert.ir.layer.BlockSamples` over a runner."""

    def __init__(self, runner: BlockRunner, index: int, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        self._runner, self._index, self._inputs = runner, index, inputs
        self.targets = targets
        self.importance = [_importance(*pair) for pair in zip(targets, map(padding_mask, runner.batches), strict=True)]

    @contextmanager
    def running(self, fixed: Mapping[str, Tensor]) -> Iterator[Callable[[int, Mapping[str, Tensor]], Tensor]]:
        model, device = self._runner.model, self._runner.device

        def read(name: str) -> Tensor:
            return fixed[name] if name in fixed else model.read(name)

        with self._runner.differentiable(self._index, read) as call:

            def forward(batch: int, weights: Mapping[str, Tensor]) -> Tensor:
                parameters = {
                    f"{name}.weight": in_own_shape(model.module.get_submodule(name), weight).to(device)
                    for name, weight in weights.items()
                }
                return call(batch, self._inputs[batch], parameters)

            yield forward


def _importance(target: Tensor, mask: Tensor | None) -> Tensor:
    counts = importance_of(target)
    return counts * mask if mask is not None and mask.shape == counts.shape else counts
