"""Padding of a decoder's rows, on either side.

GroupQueryAttention wants a row's tokens one behind the other, in the run at hand and in the cache, which it fills from the
front: padding may follow them, but not go before. So the tokens of each row are moved to the front before the model reads
them, and its hidden states are moved back before the head does. Where nothing is padded on the left, both change nothing.

What follows a row's tokens does not reach them, because attention is causal, and the next run overwrites it in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class TokensFirst:
    """The order of each row in one run of a decoder: its tokens in front, in their own order, padding behind them.

    before: [batch], how many tokens of each row the cache holds.
    places: [batch, sequence], where each column of the run goes: padding to -1, the last place, which no token takes then.
    positions: [batch, sequence], of what is in each place: a token's is the number of tokens before it.
    """

    def __init__(self, attention_mask: Tensor, sequence: int) -> None:
        """attention_mask: [batch, total], 1 where a token is; the last `sequence` columns are those of this run."""
        run = attention_mask.narrow(1, attention_mask.shape[1] - sequence, sequence)
        self.before = attention_mask.sum(1) - run.sum(1)
        so_far = run.cumsum(1)
        self.places = run * so_far - 1
        self.positions = self.applied((self.before[:, None] + so_far - 1).clamp(min=0))

    def applied(self, columns: Tensor) -> Tensor:
        """Put [batch, sequence] into this order. Only traced: ONNX counts a place of -1 from the end, torch does not."""
        return columns.scatter(1, self.places, columns)

    @contextmanager
    def undone_before(self, head: nn.Module) -> Iterator[None]:
        """Let `head` read its hidden states [batch, sequence, hidden] in the rows' own order within the context."""

        def undo(module: nn.Module, args: tuple[Any, ...]) -> Any:
            states: Tensor = args[0]
            moved = torch.onnx.ops.symbolic(
                "GatherND",
                (states, self.places[..., None]),
                attrs={"batch_dims": 1},
                dtype=states.dtype,
                shape=states.shape,
                version=13,
            )
            return (moved, *args[1:])

        hook = head.register_forward_pre_hook(undo)
        try:
            yield
        finally:
            hook.remove()
