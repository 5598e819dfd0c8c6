"""Running a Model in float32 with the weights of one block in memory at a time.

`calibrate` runs the float weights this way, `verify` also the dequantized ones. The skeleton's own forward does all the
work around the blocks (embeddings, masks, position embeddings, final norm, head); only its blocks are stood in for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from qconvert.errors import InputError, UsageError
from qconvert.ir.layer import Batch
from qconvert.ir.model import Model
from qconvert.ir.report import Task

ReadParameter = Callable[[str], Tensor]


class StopForward(Exception):
    """Raised inside a forward, e.g. by a hook, to end it early; BlockRunner takes it as the end of that batch."""


@contextmanager
def materialize(model: Model, unit: str, read: ReadParameter | None = None, device: str = "cpu") -> Iterator[None]:
    """Within the context, the parameters of one unit are real float32 tensors; afterwards they are what they were.

    unit: a block, or "" for everything outside the blocks. Its buffers are moved to `device` too.
    read: parameter name (as the module has it) -> tensor; unset: the model's own, each tied tensor read once. float32
        tensors on the CPU are used without a copy, so they are never to be written to.
    """
    with ExitStack() as undo:
        loaded: dict[str, nn.Parameter] = {}
        for prefix, module in list(_modules(model, unit)):
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                name = f"{prefix}.{leaf}" if prefix else leaf
                key = model.stored_name(name) if read is None else name
                if key not in loaded:
                    tensor = (read or model.read)(name).to(device=device, dtype=torch.float32)
                    loaded[key] = nn.Parameter(tensor, requires_grad=False)
                undo.callback(setattr, module, leaf, parameter)
                setattr(module, leaf, loaded[key])
            for leaf, buffer in list(module.named_buffers(recurse=False)):
                undo.callback(setattr, module, leaf, buffer)
                setattr(module, leaf, buffer.to(device))
        yield


def _modules(model: Model, unit: str) -> Iterator[tuple[str, nn.Module]]:
    root = model.module.get_submodule(unit)
    for name, module in root.named_modules(prefix=unit, remove_duplicate=False):
        if model.block_of(name) == unit:
            yield name, module


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """All that a block was called with, but for the hidden state: masks and position embeddings differ by block."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    positional: bool  # whether the hidden state is the first positional argument

    @staticmethod
    def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, _Call]:
        if args:
            return args[0], _Call(args[1:], kwargs, True)
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return kwargs.get("hidden_states"), _Call((), others, False)

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        if self.positional:
            return block(hidden, *self.args, **self.kwargs)
        return block(hidden_states=hidden, **self.kwargs)


class BlockRunner:
    """Runs batches through a model, block by block.

        runner.start(batches)
        for index in range(len(model.blocks)):
            runner.run_block(index)
        for output in runner.outputs(): ...

    hidden: per batch the input of the next block, e.g. [rows, tokens, hidden], on `device`.
    batches: the inputs, on `device`.

    Raises UsageError QC-DEVICE-001 if `device` is not there, and InputError QC-BLOCK-001 if the blocks do not simply
    hand one hidden state from each to the next: what would be computed then is not what the model computes.
    """

    def __init__(self, model: Model, read: ReadParameter | None = None, device: str = "cpu") -> None:
        self.model = model
        self.read = read
        self.device = checked_device(device)
        self.hidden: list[Tensor] = []
        self.batches: list[Batch] = []
        self._blocks = [model.module.get_submodule(name) for name in model.blocks]
        self._calls: list[list[_Call]] = []  # per batch, per block
        self._tail: tuple[Any, ...] | None = None  # what follows the hidden state where a block returns a tuple

    def start(self, batches: Sequence[Batch]) -> None:
        """Run what comes before the first block, and learn how the model calls its blocks."""
        self.batches = [{name: value.to(self.device) for name, value in batch.items()} for batch in batches]
        self.hidden, self._calls = [], []
        if not self._blocks or not self.batches:
            return
        with self.weights_of(""):
            with self.weights_of(self.model.blocks[0]):
                self._learn_output(self.batches[0])
            for batch in self.batches:
                self._record(batch)

    def run_block(self, index: int) -> None:
        """Advance the hidden states of all batches through one block."""
        with self.weights_of(self.model.blocks[index]):
            for batch in range(len(self.batches)):
                self.hidden[batch] = self.call_block(index, batch, self.hidden[batch])

    @torch.no_grad()
    def outputs(self) -> Iterator[tuple[Tensor, ...]]:
        """`graph_outputs` per batch, once all blocks are run (a model without blocks runs whole, here)."""
        with self.weights_of(""):
            for batch, inputs in enumerate(self.batches):
                with self._stand_ins(lambda index, *args, **kwargs: self._wrap(self.hidden[batch])):  # noqa: B023
                    outputs = graph_outputs(self.model.task, self.model.module, inputs)
                yield outputs

    def weights_of(self, unit: str, read: ReadParameter | None = None) -> AbstractContextManager[None]:
        """`materialize` with this runner's device, and its `read` where none is given."""
        return materialize(self.model, unit, read or self.read, self.device)

    @torch.no_grad()
    def call_block(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """One block on one batch; the block's weights must be in place."""
        output = self._calls[batch][index].run(self._blocks[index], hidden)
        output = output[0] if isinstance(output, tuple) else output
        if output.shape != hidden.shape:
            raise self._not_a_chain(f"block {index} turns a state of shape {list(hidden.shape)} into {list(output.shape)}")
        return cast(Tensor, output)

    @torch.no_grad()
    def run_outside(self, batch: int) -> list[Tensor]:
        """Everything but the blocks, heads included, on one batch: all tensors that the model returns, [] if it was
        stopped. The weights of "" must be in place. The blocks give the current hidden state."""
        with self._stand_ins(lambda index, *args, **kwargs: self._wrap(self.hidden[batch])):
            return list(tensors_in(self._forward(self.batches[batch])))

    def _forward(self, batch: Batch) -> Any:
        """The whole model with all its heads; () where a hook stopped it."""
        options = {"use_cache": False, "return_dict": True} if self.model.task == "causal-lm" else {}
        try:
            return self.model.module(**batch, **options)
        except StopForward:
            return ()

    @torch.no_grad()
    def _learn_output(self, batch: Batch) -> None:
        """Run the first block for real, to see whether blocks return a tensor or a tuple."""

        def look(module: nn.Module, args: Any, output: Any) -> None:
            self._tail = tuple(output[1:]) if isinstance(output, tuple) else None
            raise StopForward

        hook = self._blocks[0].register_forward_hook(look)
        try:
            self._forward(batch)
        finally:
            hook.remove()
        if self._tail and any(True for _ in tensors_in(self._tail)):
            raise self._not_a_chain("blocks hand on more tensors than the hidden state")

    @torch.no_grad()
    def _record(self, batch: Batch) -> None:
        calls: list[_Call] = []
        first: list[Tensor] = []

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden, call = _Call.split(args, kwargs)
            if not isinstance(hidden, Tensor):
                raise self._not_a_chain(f"block {index} is called without a hidden state")
            if index != len(calls):
                raise self._not_a_chain(f"block {index} is called where block {len(calls)} should be")
            if first and hidden is not first[0]:
                raise self._not_a_chain(f"the model changes the hidden state between blocks {index - 1} and {index}")
            first[:] = [hidden]
            calls.append(call)
            if len(calls) == len(self._blocks):
                raise StopForward
            return self._wrap(hidden)

        with self._stand_ins(stand_in):
            self._forward(batch)
        if len(calls) < len(self._blocks):
            raise self._not_a_chain(f"only {len(calls)} of {len(self._blocks)} blocks are called")
        self.hidden.append(first[0])
        self._calls.append(calls)

    def _wrap(self, hidden: Tensor) -> Any:
        return hidden if self._tail is None else (hidden, *self._tail)

    @contextmanager
    def _stand_ins(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Blocks keep their attributes, which models look at, but compute `forward(index, *args, **kwargs)`."""
        with ExitStack() as undo:
            for index, block in enumerate(self._blocks):
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


@torch.no_grad()
def graph_outputs(task: Task, module: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """What a model's graph gives for a batch, computed by torch.

    causal-lm: logits [rows, tokens, vocabulary]. encoder: last_hidden_state [rows, tokens, hidden], then the logits of a
    head if there is one. module: every tensor that its forward returns.
    """
    if task == "causal-lm":
        return (cast(Tensor, module(**batch, use_cache=False, return_dict=True).logits),)
    if task == "module":
        return tuple(tensors_in(module(**batch)))
    states: list[Tensor] = []
    base = cast(nn.Module, module.base_model)
    hook = base.register_forward_hook(lambda part, args, output: states.append(output[0]))
    try:
        output = module(**batch, return_dict=True)
    finally:
        hook.remove()
    return (states[0], output.logits) if "logits" in output else (states[0],)


def checked_device(device: str) -> str:
    """`device` if tensors can be put there. Raises UsageError QC-DEVICE-001."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a CPU build of torch asserts
        reason = str(error).splitlines()[0]
        raise UsageError("QC-DEVICE-001", f"device {device!r} can't be used: {reason}", hint="use --device cpu") from error
    return device


def tensors_in(result: Any) -> Iterator[Tensor]:
    """All tensors in what a forward returned, in order."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from tensors_in(value)
    elif isinstance(result, tuple | list):
        for value in result:
            yield from tensors_in(value)
