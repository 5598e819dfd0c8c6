"""Lane: one batch on its way through the blocks of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from qconvert.ir.batch import Batch


@dataclass(frozen=True, slots=True, eq=False)
class BlockCall:
    """The arguments of a block, but for the hidden state: masks and position embeddings differ by block.

    positional: whether the hidden state is the first positional argument.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    positional: bool

    @staticmethod
    def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, BlockCall]:
        """Return the hidden state of a call, None where it has none, and the rest."""
        if args:
            return args[0], BlockCall(args[1:], kwargs, True)
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return kwargs.get("hidden_states"), BlockCall((), others, False)

    def arguments(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and the named arguments of a block's forward."""
        if self.positional:
            return (hidden, *self.args), dict(self.kwargs)
        return (), {"hidden_states": hidden, **self.kwargs}


@dataclass(slots=True, eq=False)
class Lane:
    """A batch, how far it has come, and how the model calls its blocks on it. Plain data: it can be handed to another process.

    batch: the model's inputs.
    hidden: the input of the next block, e.g. [rows, tokens, hidden]; None before the first.
    calls: index of a block -> call.
    tails: per stack that has begun, what its blocks return behind the hidden state; None where they return a tensor.
    ends: per stack that is done, its last hidden state.
    """

    batch: Batch
    hidden: Tensor | None = None
    calls: dict[int, BlockCall] = field(default_factory=dict)
    tails: list[tuple[Any, ...] | None] = field(default_factory=list)
    ends: list[Tensor] = field(default_factory=list)

    @property
    def state(self) -> Tensor:
        """The `hidden` of a lane that has been started."""
        assert self.hidden is not None
        return self.hidden

    def fork(self, hidden: Tensor | None) -> Lane:
        """Return a lane that has come as far, and differs in its hidden state alone."""
        return replace(self, hidden=hidden, calls=dict(self.calls), tails=list(self.tails), ends=list(self.ends))

    def at(self, index: int) -> Lane:
        """Return the lane as block `index` needs it; the index beyond the last block stands for what lies outside of them."""
        calls = {index: self.calls[index]} if index in self.calls else {}
        return replace(self, calls=calls, tails=list(self.tails), ends=list(self.ends))
