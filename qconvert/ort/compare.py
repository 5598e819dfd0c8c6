"""The comparison of an ONNX graph with a torch model, on a few rows of different length, padded on either side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qconvert.execution.probes import (
    DECODER_STEPS,
    LENGTHS,
    NEXT_TOKENS,
    SIDES,
    _rows,
    columns_of,
    padded_batch,
    vocabulary_size,
)
from qconvert.ir.batch import row_count
from qconvert.ir.graph_names import CROSS
from qconvert.ir.model import Model
from qconvert.ort.pieces import run_each
from qconvert.ort.session import Values, empty

# The reference's outputs for each of the probes; (what a session gives, what it should give).
References = Sequence[Sequence[np.ndarray[Any, Any]]]
Pairs = Iterator[tuple[np.ndarray[Any, Any], ...]]


def largest_difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Return max |found - expected| / max |expected|; infinite where shapes differ or a value is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all() or not np.isfinite(expected).all():
        return float("inf")
    found, expected = found.astype(np.float64), expected.astype(np.float64)  # truth values and codes have no differences
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))


def feed(session: Any, batch: Mapping[str, Tensor]) -> Values:
    """Return the session's inputs from a batch, with empty KV caches where it has them."""
    inputs = {name: value.numpy() for name, value in batch.items()}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            inputs[value.name] = empty((row_count(batch), value.shape[1], 0, value.shape[3]), value.type)
    return inputs


def next_inputs(session: Any, inputs: Values, found: Sequence[np.ndarray[Any, Any]], tokens: np.ndarray[Any, Any]) -> Values:
    """Return the inputs of the step after a run of a decoder: it reads `tokens` [rows, n] on the caches that the run gave.

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
    """Return the largest difference between the session's outputs and the reference, each relative to its largest |output|."""
    return max(largest_difference(found, reference) for found, reference in compared(model, session, expected))


def compared(model: Model, session: Any, expected: Sequence[tuple[Tensor, ...]]) -> list[tuple[np.ndarray[Any, Any], ...]]:
    """Run the session, and return (its output, what it should be), row by row for text models.

    expected: the reference's outputs (see execution.block_runner.graph_outputs) for each of `probes(model)`.
    The session gets the batch padded on the right, and then on the left; those that write text take steps on its cache.
    Padding itself is not compared.
    """
    references = [[output.numpy() for output in outputs] for outputs in expected]
    if not model.task.takes_text:
        return list(zip(session.run(None, feed(session, padded_batch(model))), references[0], strict=True))
    pairs_of = _encoder_pairs
    if model.task.generates:
        pairs_of = _stepwise if model.task.reads_source else _decoder_pairs
    return list(pairs_of(model, session, references))


def _decoder_pairs(model: Model, session: Any, references: References) -> Pairs:
    """Yield the pairs of each row's tokens, and of a step after them.

    references: of each row by itself, logits of all its tokens.
    """
    prompts, found = _first_runs(model, session)
    step = np.array(NEXT_TOKENS)[:, None] % vocabulary_size(model)
    steps = [next_inputs(session, *run, step) for run in zip(prompts, found, strict=True)]
    for side, outputs, (next_logits, *_) in zip(SIDES, found, run_each(session, steps), strict=True):
        for row, length in enumerate(LENGTHS):
            logits = references[row][0][0]
            yield outputs[0][row, columns_of(row, side)], logits[:length]
            yield next_logits[row, 0], logits[length]


def _encoder_pairs(model: Model, session: Any, references: References) -> Pairs:
    """Yield the pairs of each row's tokens, or its one vector.

    references: of each row by itself, then of the batch padded on the left.
    """
    for side, found in zip(SIDES, _first_runs(model, session)[1], strict=True):
        for output, *alone, batch in zip(found, *references, strict=True):
            by_token = len({reference.shape[1] for reference in alone}) > 1  # or one vector per sentence
            for row, reference in enumerate(alone):
                own = (row, columns_of(row, side)) if by_token else row
                yield output[own], reference[0] if side == "right" else batch[own]


def _stepwise(model: Model, session: Any, references: References) -> Pairs:
    """Yield the pairs of the first run and of every step after it.

    references: logits of all tokens, of each row's source by itself, then of the batch padded on the left.
    """
    expected = np.concatenate([logits for (logits,) in references[:-1]]), references[-1][0]
    tokens = torch.cat([row["decoder_input_ids"] for row in _rows(model, later=True)]).numpy()
    inputs, found = _first_runs(model, session)
    read = 0
    for count in DECODER_STEPS:
        if read:
            later = tokens[:, read : read + count]
            inputs = [next_inputs(session, *run, later) for run in zip(inputs, found, strict=True)]
            found = list(run_each(session, inputs))
        for outputs, logits in zip(found, expected, strict=True):
            yield outputs[0], logits[:, read : read + count]
        read += count


def _first_runs(model: Model, session: Any) -> tuple[list[Values], list[list[np.ndarray[Any, Any]]]]:
    """The batch padded on either side of SIDES, and what comes out of each."""
    inputs = [feed(session, padded_batch(model, side)) for side in SIDES]
    return inputs, list(run_each(session, inputs))
