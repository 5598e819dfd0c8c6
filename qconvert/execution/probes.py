"""The inputs on which two forms of a model are compared: rows of different length, padded on either side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qconvert.ir.batch import Batch
from qconvert.ir.model import Model

# Rows of different length: the second has to ignore what is not there. Neither they nor their number are what graphs are traced
# with (trace/signature.py), so that what is fixed there is found.
LENGTHS = (9, 6)

# Where padding is put. transformers' generate puts it on the left.
Side = Literal["right", "left"]

SIDES: tuple[Side, ...] = ("right", "left")

# The token after each row, for one decode step on the cache.
NEXT_TOKENS = (3, 4)

# An encoder-decoder's: sources long enough for the coarse end of relative positions, and the decoder's tokens of the
# first run and of two steps on its cache.
SOURCE_LENGTHS = (40, 27)

DECODER_STEPS = (25, 1, 4)


def vocabulary_size(model: Model) -> int:
    """Return the number of rows of the input embedding."""
    embedding = model.module.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def position_limit(model: Model) -> int | None:
    """Return how many tokens a text model takes at once, None where its config does not say."""
    limit = getattr(getattr(model.module, "config", None), "max_position_embeddings", None)
    if limit is None:
        return None
    return int(limit) - first_position(model.module)


def first_position(module: nn.Module) -> int:
    """Return the position of a row's first token: RoBERTa and its kin have none for padding, nor any before that."""
    tables = (part for name, part in module.named_modules() if name.endswith("position_embeddings"))
    return max((padding + 1 for table in tables if (padding := getattr(table, "padding_idx", None)) is not None), default=0)


def probes(model: Model) -> list[Batch]:
    """Return the inputs that the reference is run on: each row of token ids by itself, unpadded; or as many example inputs.

    For encoders and encoder-decoders the rows follow as one batch, padded on the left: where that moves positions (BERT,
    BART), torch gives other numbers than for the row alone. A decoder's positions are those of the row alone.
    """
    if not model.task.takes_text:
        return [model.example_rows(len(LENGTHS))]
    rows = _rows(model, later=True)
    return rows if model.task.continues_prompts else [*rows, _padded(rows, "left")]


def _rows(model: Model, *, later: bool) -> list[Batch]:
    """Each row by itself. later: with the tokens of steps on the cache."""
    vocabulary = vocabulary_size(model)
    if model.task.reads_source:
        decoded = sum(DECODER_STEPS) if later else DECODER_STEPS[0]
        return [
            {
                "input_ids": _tokens(length, row, vocabulary),
                "attention_mask": torch.ones(1, length, dtype=torch.long),
                "decoder_input_ids": _tokens(decoded, row + 2, vocabulary),
            }
            for row, length in enumerate(SOURCE_LENGTHS)
        ]
    batches = []
    for row, length in enumerate(LENGTHS):
        ids = _tokens(length, row, vocabulary)
        if model.task.continues_prompts and later:
            ids = torch.cat((ids, torch.tensor([[NEXT_TOKENS[row] % vocabulary]])), 1)
        others = {name: torch.zeros_like(ids) for name in model.input_names}
        batches.append(others | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches


def _tokens(length: int, seed: int, vocabulary: int) -> Tensor:
    """Token ids [1, length] spread over the vocabulary; another `seed` gives others."""
    return ((torch.arange(length) * 7919 + 13 * seed + 5) % vocabulary)[None]


def padded_batch(model: Model, side: Side = "right") -> Batch:
    """Return the rows of `probes` as one batch, without the tokens of later steps."""
    return probes(model)[0] if not model.task.takes_text else _padded(_rows(model, later=False), side)


def _padded(rows: Sequence[Batch], side: Side) -> Batch:
    return {name: pad_sequence([row[name][0] for row in rows], batch_first=True, padding_side=side) for name in rows[0]}


def columns_of(row: int, side: Side) -> slice:
    """Return the columns of `padded_batch` that hold the tokens of a row; not of an encoder-decoder's source."""
    longest = max(LENGTHS)
    return slice(0, LENGTHS[row]) if side == "right" else slice(longest - LENGTHS[row], longest)
