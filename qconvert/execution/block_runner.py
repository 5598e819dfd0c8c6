"""Running a Model in float32 with the weights of one block in memory at a time.

`calibrate` runs the float weights this way, `verify` also the dequantized ones. The skeleton's own forward does all the
work around the blocks (embeddings, masks, position embeddings, final norm, head); only its blocks are stood in for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qconvert.errors import InputError, UsageError
from qconvert.execution.materialize import ReadParameter, materialize
from qconvert.execution.outputs import graph_outputs, tensors_in
from qconvert.ir.batch import Batch
from qconvert.ir.lane import BlockCall, Lane
from qconvert.ir.large_tensors import kept
from qconvert.ir.model import Model


class StopForward(Exception):
    """Raised inside a forward, e.g. by a hook, to end it early; BlockRunner takes it as the end of that batch."""


class BlockRunner:
    """Runs batches through a model, block by block.

        runner.start(batches)
        for index in range(len(model.blocks)):
            runner.run_block(index)
        for output in runner.outputs(): ...

    lanes: one for each batch, on `device`.
    Beside the hidden state a stack's first block may hand on tensors that the later ones hand on as they are (T5's
    position biases).

    Raises UsageError QC-DEVICE-001 if `device` is not there, and InputError QC-BLOCK-001 if the blocks do not simply
    hand one hidden state from each to the next: what would be computed then is not what the model computes.
    """

    def __init__(
        self, model: Model, read: ReadParameter | None = None, device: str = "cpu", lanes: Sequence[Lane] = ()
    ) -> None:
        self.model = model
        self.read = read
        self.device = checked_device(device)
        self.lanes = list(lanes)
        self._blocks = [model.module.get_submodule(name) for name in model.blocks]
        starts = list(accumulate((len(stack) for stack in model.stacks), initial=0))
        self._stacks = [range(start, end) for start, end in pairwise(starts)]

    def start(self, batches: Sequence[Batch]) -> None:
        """Run what comes before the first block, and learn how the model calls its blocks."""
        self.lanes = [Lane({name: value.to(self.device) for name, value in batch.items()}) for batch in batches]
        self.enter(0)

    def enter(self, index: int) -> None:
        """Make `hidden` the input of block `index`, which comes next: where it begins a stack, run what lies before that."""
        begun = len(self.lanes[0].tails) if self.lanes else len(self._stacks)
        if begun == len(self._stacks) or self._stacks[begun].start != index:
            return
        stack = self._stacks[begun]
        with self.weights_of(""), self.weights_of(self.model.blocks[index]):
            if begun:
                for lane in self.lanes:
                    lane.ends.append(lane.state)
            tail = self._tail_of(stack, self.lanes[0])
            shares = any(True for _ in tensors_in(tail))
            for number, lane in enumerate(self.lanes):
                lane.tails.append(self._tail_of(stack, lane) if shares and number else tail)
                self._record(stack, lane)

    def run_block(self, index: int, read: ReadParameter | None = None) -> None:
        """Advance all lanes through one block, with the parameters that `read` gives if it is set."""
        self.enter(index)
        with self.weights_of(self.model.blocks[index], read):
            for lane in self.lanes:
                lane.hidden = self.call_block(index, lane)

    @torch.no_grad()
    def outputs(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the `graph_outputs` of each lane, once all blocks are run (a model without blocks runs whole, here)."""
        with self.weights_of(""):
            for lane in self.lanes:
                with self._stand_ins(partial(self._result, lane), self._blocks):
                    outputs = graph_outputs(self.model.task, self.model.module, lane.batch)
                yield outputs

    def weights_of(self, unit: str, read: ReadParameter | None = None) -> AbstractContextManager[None]:
        """Call `materialize` with this runner's device, and its `read` where none is given."""
        return materialize(self.model, unit, read or self.read, self.device)

    @torch.no_grad()
    def call_block(self, index: int, lane: Lane) -> Tensor:
        """Return what one block makes of a lane's hidden state; the block's weights must be in place."""
        hidden = lane.state
        args, kwargs = lane.calls[index].arguments(hidden)
        output = self._blocks[index](*args, **kwargs)
        output, tail = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
        if output.shape != hidden.shape:
            raise self._not_a_chain(f"block {index} turns a state of shape {list(hidden.shape)} into {list(output.shape)}")
        expected = list(tensors_in(lane.tails[self._stack_of(index)]))
        found = list(tensors_in(tail))
        if len(found) != len(expected) or not all(map(torch.equal, found, expected)):
            raise self._not_a_chain(f"block {index} hands on other tensors, beside the hidden state, than the first one")
        return kept(cast(Tensor, output), together=len(self.lanes))

    @contextmanager
    def differentiable(self, index: int, read: ReadParameter) -> Iterator[Callable[[Lane, Mapping[str, Tensor]], Tensor]]:
        """Give, within the context, a function from (lane, parameters by their full names) to the output of a block.

        Gradients flow to those parameters; all others are what `read` gives.
        """
        unit, block = self.model.blocks[index], self._blocks[index]

        def call(lane: Lane, parameters: Mapping[str, Tensor]) -> Tensor:
            own = {name.removeprefix(f"{unit}."): tensor for name, tensor in parameters.items()}
            output = functional_call(block, own, *lane.calls[index].arguments(lane.state))
            return cast(Tensor, output[0] if isinstance(output, tuple) else output)

        with self.weights_of(unit, read), torch.enable_grad():
            yield call

    @torch.no_grad()
    def run_outside(self, lane: Lane) -> list[Tensor]:
        """Run everything but the blocks, heads included, on one lane: the blocks give the lane's hidden state.

        Returns all tensors that the model returns, [] if it was stopped. The weights of "" must be in place.
        """
        with self._stand_ins(partial(self._result, lane), self._blocks):
            return list(tensors_in(self._forward(lane.batch)))

    def run_unit(self, index: int, lane: Lane) -> list[Tensor]:
        """Run a block on a lane, or for the index beyond the last block what lies outside them, and return what it gives."""
        return [self.call_block(index, lane)] if index < len(self._blocks) else self.run_outside(lane)

    def _forward(self, batch: Batch) -> Any:
        """The whole model with all its heads; () where a hook stopped it."""
        options = {"use_cache": False, "return_dict": True} if self.model.task.generates else {}
        try:
            return self.model.module(**batch, **options)
        except StopForward:
            return ()

    def _stack_of(self, index: int) -> int:
        return next(number for number, stack in enumerate(self._stacks) if index in stack)

    def _result(self, lane: Lane, index: int, *args: Any, **kwargs: Any) -> Any:
        """Return what a block of a stack, already run or running, gives in the place of the stack's last one."""
        number = self._stack_of(index)
        return _with_tail(lane.ends[number] if number < len(lane.ends) else lane.state, lane.tails[number])

    @torch.no_grad()
    def _tail_of(self, stack: range, lane: Lane) -> tuple[Any, ...] | None:
        """Run the first block of a stack: what it returns behind the hidden state, None where it returns a tensor."""
        found: list[tuple[Any, ...] | None] = []

        def look(module: nn.Module, args: Any, output: Any) -> None:
            found.append(tuple(output[1:]) if isinstance(output, tuple) else None)
            raise StopForward

        hook = self._blocks[stack.start].register_forward_hook(look)
        try:
            with self._stand_ins(partial(self._result, lane), self._blocks[: stack.start]):
                self._forward(lane.batch)
        finally:
            hook.remove()
        return found[0] if found else None

    @torch.no_grad()
    def _record(self, stack: range, lane: Lane) -> None:
        """Learn how the model calls the blocks of a stack, and with which hidden state the first."""
        calls: dict[int, BlockCall] = {}
        first: list[Tensor] = []

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            if index < stack.start:
                return self._result(lane, index)
            hidden, call = BlockCall.split(args, kwargs)
            expected = stack.start + len(calls)
            if not isinstance(hidden, Tensor):
                raise self._not_a_chain(f"block {index} is called without a hidden state")
            if index != expected:
                raise self._not_a_chain(f"block {index} is called where block {expected} should be")
            if first and hidden is not first[0]:
                raise self._not_a_chain(f"the model changes the hidden state between blocks {index - 1} and {index}")
            first[:] = [hidden]
            calls[index] = call
            if len(calls) == len(stack):
                raise StopForward
            return _with_tail(hidden, lane.tails[-1])

        with self._stand_ins(stand_in, self._blocks):
            self._forward(lane.batch)
        if len(calls) < len(stack):
            raise self._not_a_chain(f"only {len(calls)} of {len(stack)} blocks are called")
        lane.calls |= calls
        lane.hidden = kept(first[0], together=len(self.lanes))

    @contextmanager
    def _stand_ins(self, forward: Callable[..., Any], blocks: Sequence[nn.Module]) -> Iterator[None]:
        """The first of the blocks keep their attributes, which models look at, but compute `forward(index, ...)`."""
        with ExitStack() as undo:
            for index, block in enumerate(blocks):
                attributes = vars(block)
                undo.callback(attributes.update, {"forward": attributes["forward"]} if "forward" in attributes else {})
                undo.callback(attributes.pop, "forward")
                attributes["forward"] = partial(forward, index)
            yield

    def _not_a_chain(self, reason: str) -> InputError:
        first, last = self.model.blocks[0], self.model.blocks[-1]
        return InputError(
            "QC-BLOCK-001",
            f"{self.model.name!r}: the blocks {first!r} to {last!r} can't be run one by one: {reason}",
            hint="this architecture needs a loader plugin that gives a Model without blocks, so that it runs whole",
        )


def _with_tail(hidden: Tensor, tail: tuple[Any, ...] | None) -> Any:
    return hidden if tail is None else (hidden, *tail)


def checked_device(device: str) -> str:
    """Return `device` if tensors can be put there. Raises UsageError QC-DEVICE-001."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a CPU build of torch asserts
        reason = str(error).splitlines()[0]
        raise UsageError("QC-DEVICE-001", f"device {device!r} can't be used: {reason}", hint="use --device cpu") from error
    return device
