"""Whether an ONNX graph and a torch model compute the same, on a few rows of different length, padded on either side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qconvert.ir.layer import Batch, row_count
from qconvert.ir.model import Model
from qconvert.ir.runtime import CROSS, Values, empty

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


# The reference's outputs for each of the probes; (what a session gives, what it should give).
References = Sequence[Sequence[np.ndarray[Any, Any]]]
Pairs = Iterator[tuple[np.ndarray[Any, Any], ...]]


def largest_difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """max |found - expected| / max |expected|; infinite where shapes differ or a value is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all() or not np.isfinite(expected).all():
        return float("inf")
    found, expected = found.astype(np.float64), expected.astype(np.float64)  # truth values and codes have no differences
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))


def vocabulary_size(model: Model) -> int:
    """Rows of the input embedding."""
    embedding = model.module.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def position_limit(model: Model) -> int | None:
    """How many tokens a text model takes at once, None where its config does not say."""
    limit = getattr(getattr(model.module, "config", None), "max_position_embeddings", None)
    if limit is None:
        return None
    return int(limit) - first_position(model.module)


def first_position(module: nn.Module) -> int:
    """The position of a row's first token: RoBERTa and its kin have none for padding, nor any before that."""
    tables = (part for name, part in module.named_modules() if name.endswith("position_embeddings"))
    return max((padding + 1 for table in tables if (padding := getattr(table, "padding_idx", None)) is not None), default=0)


def probes(model: Model) -> list[Batch]:
    """What the reference is run on: each row of token ids by itself, without padding; or as many example inputs.

    For encoders and encoder-decoders the rows follow as one batch, padded on the left: where that moves positions (BERT,
    BART), torch gives other numbers than for the row alone. A decoder's positions are those of the row alone.
    """
    if model.task == "module":
        return [model.example_rows(len(LENGTHS))]
    rows = _rows(model, later=True)
    return rows if model.task == "causal-lm" else [*rows, _padded(rows, "left")]


def _rows(model: Model, *, later: bool) -> list[Batch]:
    """Each row by itself. later: with the tokens of steps on the cache."""
    vocabulary = vocabulary_size(model)
    if model.task == "seq2seq-lm":
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
        if model.task == "causal-lm" and later:
            ids = torch.cat((ids, torch.tensor([[NEXT_TOKENS[row] % vocabulary]])), 1)
        others = {name: torch.zeros_like(ids) for name in model.input_names}
        batches.append(others | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches


def _tokens(length: int, seed: int, vocabulary: int) -> Tensor:
    """[1, length]"""
    return ((torch.arange(length) * 7919 + 13 * seed + 5) % vocabulary)[None]


def padded_batch(model: Model, side: Side = "right") -> Batch:
    """The rows of `probes` as one batch; without the tokens of later steps."""
    return probes(model)[0] if model.task == "module" else _padded(_rows(model, later=False), side)


def _padded(rows: Sequence[Batch], side: Side) -> Batch:
    return {name: pad_sequence([row[name][0] for row in rows], batch_first=True, padding_side=side) for name in rows[0]}


def columns_of(row: int, side: Side) -> slice:
    """Where the tokens of a row are in `padded_batch`; not of an encoder-decoder's source."""
    longest = max(LENGTHS)
    return slice(0, LENGTHS[row]) if side == "right" else slice(longest - LENGTHS[row], longest)


def feed(session: Any, batch: Mapping[str, Tensor]) -> Values:
    """The session's inputs from a batch, with empty KV caches where it has them."""
    inputs = {name: value.numpy() for name, value in batch.items()}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            inputs[value.name] = empty((row_count(batch), value.shape[1], 0, value.shape[3]), value.type)
    return inputs


def next_inputs(session: Any, inputs: Values, found: Sequence[np.ndarray[Any, Any]], tokens: np.ndarray[Any, Any]) -> Values:
    """The inputs of the step after a run of a decoder: it reads `tokens` [rows, n] on the caches that the run gave.

    inputs, found: what went into the run and came out of it.
    """
    outputs = dict(zip((value.name for value in session.get_outputs()), found, strict=True))
    caches = {
        name: outputs[name.replace("past_key_values", "present")] for name in inputs if name.startswith("past_key_values.")
    }
    mask = inputs["attention_mask"]
    if "decoder_input_ids" in inputs:  # the source stays as it is, and what the encoder made of it
        cross = {name: value for name, value in outputs.items() if name.startswith(CROSS)}
        return {"decoder_input_ids": tokens, "attention_mask": mask, **cross, **caches}
    return {"input_ids": tokens, "attention_mask": np.concatenate((mask, np.ones_like(tokens)), 1), **caches}


def relative_error(model: Model, session: Any, expected: Sequence[tuple[Tensor, ...]]) -> float:
    """Largest difference between the session's outputs and the reference, each relative to its largest |output|."""
    return max(largest_difference(found, reference) for found, reference in compared(model, session, expected))


def compared(model: Model, session: Any, expected: Sequence[tuple[Tensor, ...]]) -> list[tuple[np.ndarray[Any, Any], ...]]:
    """(output of the session, what it should be), row by row for text models.

    expected: the reference's outputs (see ir.forward.graph_outputs) for each of `probes(model)`.
    The session gets the batch padded on the right, and then on the left; those that write text take steps on its cache.
    Padding itself is not compared.
    """
    references = [[output.numpy() for output in outputs] for outputs in expected]
    if model.task == "module":
        return list(zip(session.run(None, feed(session, padded_batch(model))), references[0], strict=True))
    compare = {"causal-lm": _decoder_pairs, "seq2seq-lm": _stepwise, "encoder": _encoder_pairs}[model.task]
    return [pair for side in SIDES for pair in compare(model, session, side, references)]


def _decoder_pairs(model: Model, session: Any, side: Side, references: References) -> Pairs:
    """Of each row's tokens, and of a step after them. references: of each row by itself, logits of all its tokens."""
    inputs = feed(session, padded_batch(model, side))
    found = session.run(None, inputs)
    step = np.array(NEXT_TOKENS)[:, None] % vocabulary_size(model)
    next_logits, *_ = session.run(None, next_inputs(session, inputs, found, step))
    for row, length in enumerate(LENGTHS):
        logits = references[row][0][0]
        yield found[0][row, columns_of(row, side)], logits[:length]
        yield next_logits[row, 0], logits[length]


def _encoder_pairs(model: Model, session: Any, side: Side, references: References) -> Pairs:
    """Of each row's tokens, or its one vector. references: of each row by itself, then of the batch padded on the left."""
    found = session.run(None, feed(session, padded_batch(model, side)))
    for output, *alone, batch in zip(found, *references, strict=True):
        by_token = len({reference.shape[1] for reference in alone}) > 1  # or one vector per sentence
        for row, reference in enumerate(alone):
            own = (row, columns_of(row, side)) if by_token else row
            yield output[own], reference[0] if side == "right" else batch[own]


def _stepwise(model: Model, session: Any, side: Side, references: References) -> Pairs:
    """Of the first run and of every step after it. references: logits of all tokens, of each row's source by itself, then of
    the batch padded on the left."""
    expected = np.concatenate([logits for (logits,) in references[:-1]]) if side == "right" else references[-1][0]
    tokens = torch.cat([row["decoder_input_ids"] for row in _rows(model, later=True)]).numpy()
    inputs = feed(session, padded_batch(model, side))
    found = session.run(None, inputs)
    read = DECODER_STEPS[0]
    yield found[0], expected[:, :read]
    for count in DECODER_STEPS[1:]:
        inputs = next_inputs(session, inputs, found, tokens[:, read : read + count])
        found = session.run(None, inputs)
        yield found[0], expected[:, read : read + count]
        read += count
