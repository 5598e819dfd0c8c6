"""The change in a model's output for every part of it that is quantized, measured in one pass over its blocks.

A few samples run through the float model. Behind each block, for every part of it, a variant of them sets out that has seen
this part quantized, and runs on through the float blocks beside the others: one block's weights are in memory at a time,
and each variant costs only the blocks that are left. At the head every variant is compared with the float model.

To second order these losses add up, because errors of different layers are uncorrelated: what HAWQ-V2 (Dong et al., 2020)
says with Hessians and BRECQ (Li et al., 2021) with Fisher information is measured here, without a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qconvert.execution.block_runner import BlockRunner
from qconvert.execution.divergence import kl_divergence
from qconvert.ir.batch import Batch
from qconvert.ir.model import Model

# What a variant replaces: full parameter name -> float32 tensor as in the module.
Replaced = Mapping[str, Tensor]


class Wavefront:
    """Variants of one batch on their way through the blocks.

        for block in model.blocks:
            wavefront.enter(block)
            for part in ...: wavefront.add(part)
        wavefront.losses()

    The first of the runner's batches is the float model's.
    """

    def __init__(self, model: Model, batch: Batch, device: str) -> None:
        self.model = model
        self.batch = batch
        self.runner = BlockRunner(model, device=device)
        self.runner.start([batch])
        self._next = 0  # the block that comes next
        self._waiting: list[Replaced] = []  # variants of that block
        self._outside: list[Replaced] = []

    def enter(self, unit: str) -> None:
        """Let all variants run up to a block, or to the end for "", what lies outside the blocks."""
        until = self.model.blocks.index(unit) if unit else len(self.model.blocks)
        while self._next < until:
            self._advance()

    def add(self, replaced: Replaced) -> None:
        """Set out with a variant that has these weights in the unit that was entered."""
        (self._waiting if self._next < len(self.model.blocks) else self._outside).append(replaced)

    def losses(self) -> Tensor:
        """Return what each variant loses at each token, [variants, tokens], in the order in which they were added: KL in nats
        for models that write text, else `relative_square`.
        """
        self.enter("")
        found = []
        with self._late_logits():
            outputs = self.runner.outputs()
            expected = self._judged(next(outputs))
            for output in outputs:
                found.append(self._loss(self._judged(output), expected))
            for replaced in self._outside:
                found.append(self._loss(self._judged(self._run_with(replaced)), expected))
        return torch.stack(found).cpu()

    def _advance(self) -> None:
        runner, index = self.runner, self._next
        runner.enter(index)
        block = self.model.blocks[index]
        before = runner.lanes[0].fork(runner.lanes[0].hidden)
        with runner.weights_of(block):
            for lane in runner.lanes:
                lane.hidden = runner.call_block(index, lane)
            for replaced in self._waiting:
                with _swapped(self.model.module, replaced, runner.device):
                    runner.lanes.append(runner.lanes[0].fork(runner.call_block(index, before)))
        self._waiting.clear()
        self._next += 1

    def _run_with(self, replaced: Replaced) -> tuple[Tensor, ...]:
        """A variant of what lies outside the blocks, perhaps before them, so that all of it runs again."""
        runner = BlockRunner(self.model, lambda name: replaced.get(name, self.model.read(name)), self.runner.device)
        runner.start([self.batch])
        for index in range(len(self.model.blocks)):
            runner.run_block(index)
        return next(runner.outputs())

    @contextmanager
    def _late_logits(self) -> Iterator[None]:
        """Let the output head see only the latter half of each row within the context: tokens that have a context to speak of.

        It spares half of the head, which is much of the work where a vocabulary is large.
        """
        if self.model.output_head is None or not self.model.task.generates:
            yield
            return
        head = self.model.module.get_submodule(self.model.output_head)
        hook = head.register_forward_pre_hook(lambda module, args: (args[0][:, args[0].shape[1] // 2 :], *args[1:]))
        try:
            yield
        finally:
            hook.remove()

    def _judged(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the outputs that are compared, each [tokens, values]. All that a module returns counts as one token."""
        if not self.model.task.takes_text:
            return [output.reshape(1, -1) for output in outputs]
        mask = self.batch["attention_mask"].bool().to(outputs[0].device)
        states = outputs[0][mask[:, -outputs[0].shape[1] :]]
        return [states]

    def _loss(self, found: list[Tensor], expected: list[Tensor]) -> Tensor:
        if self.model.task.generates:
            return kl_divergence(expected[0], found[0])
        return relative_square(torch.cat(found, 1), torch.cat(expected, 1))


def relative_square(found: Tensor, expected: Tensor) -> Tensor:
    """Return the square of the relative error of states [tokens, values]: [tokens]."""
    found, expected = found.double(), expected.double()
    return (found - expected).square().sum(-1) / expected.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)


@contextmanager
def _swapped(module: nn.Module, replaced: Replaced, device: str) -> Iterator[None]:
    """Put `replaced` in the place of parameters within the context."""
    before = {}
    for name, tensor in replaced.items():
        owner, _, leaf = name.rpartition(".")
        before[name] = module.get_submodule(owner)._parameters[leaf]
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor.to(device), requires_grad=False))
    try:
        yield
    finally:
        for name, parameter in before.items():
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, parameter)
