"""Task: what a model takes and gives."""

from __future__ import annotations

from typing import Literal

Task = Literal["causal-lm", "seq2seq-lm", "encoder", "module"]

# The tasks whose models write text, token by token: they have an output head and a cache.
GENERATING: tuple[Task, ...] = ("causal-lm", "seq2seq-lm")
