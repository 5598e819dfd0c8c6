"""Whether an ONNX graph and a torch model compute the same, on a few rows of different length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qconvert.ir.layer import Batch
from qconvert.ir.model import Model
from qconvert.ir.runtime import CROSS, Values, empty

# Rows of different length, padded on the right: the second has to ignore what is not there.
LENGTHS = (9, 6)

# The token after each row, for one decode step on the cache.
NEXT_TOKENS = (3, 4)

# An encoder-decoder's: sources long enough for the coarse end of relative positions, and the decoder's tokens of the
# first run and of two steps on its cache.
SOURCE_LENGTHS = (40, 27)
DECODER_STEPS = (25, 1, 4)


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
    """How many tokens a text model takes at once, None where its config.json does not say."""
    config = model.config or {}
    return config.get("max_position_embeddings") or config.get("n_positions")


def probes(model: Model) -> list[Batch]:
    """What the reference is run on: each row of token ids by itself, without padding; or the first example inputs."""
    if model.task == "module":
        return [{name: value[:2] for name, value in model.example_inputs.items()}]
    vocabulary = vocabulary_size(model)
    if model.task == "seq2seq-lm":
        return [
            {
                "input_ids": _tokens(length, row, vocabulary),
                "attention_mask": torch.ones(1, length, dtype=torch.long),
                "decoder_input_ids": _tokens(sum(DECODER_STEPS), row + 2, vocabulary),
            }
            for row, length in enumerate(SOURCE_LENGTHS)
        ]
    batches = []
    for row, length in enumerate(LENGTHS):
        ids = _tokens(length, row, vocabulary)[0]
        if model.task == "causal-lm":
            ids = torch.cat((ids, torch.tensor([NEXT_TOKENS[row] % vocabulary])))
        others = {name: torch.zeros(1, len(ids), dtype=torch.long) for name in model.input_names}
        batches.append(others | {"input_ids": ids[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.long)})
    return batches


def _tokens(length: int, seed: int, vocabulary: int) -> Tensor:
    """[1, length]"""
    return ((torch.arange(length) * 7919 + 13 * seed + 5) % vocabulary)[None]


def padded_batch(model: Model) -> Batch:
    """The rows of `probes` as one batch, padded on the right; for decoders without the tokens of later steps."""
    rows = probes(model)
    if model.task == "module":
        return rows[0]
    lengths = SOURCE_LENGTHS if model.task == "seq2seq-lm" else LENGTHS
    batch = {}
    for name in rows[0]:
        if name == "decoder_input_ids":  # not padded: what comes later does not reach what came before
            batch[name] = torch.cat([row[name][:, : DECODER_STEPS[0]] for row in rows])
            continue
        batch[name] = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, length in enumerate(lengths):
            batch[name][row, :length] = rows[row][name][0, :length]
    return batch


def feed(session: Any, batch: Mapping[str, Tensor]) -> Values:
    """The session's inputs from a batch, with empty KV caches where it has them."""
    inputs = {name: value.numpy() for name, value in batch.items()}
    rows = next(iter(inputs.values())).shape[0]
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            inputs[value.name] = empty((rows, value.shape[1], 0, value.shape[3]), value.type)
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
    The session gets the padded batch; decoders then take steps on its cache. Padding itself is not compared.
    """
    inputs = feed(session, padded_batch(model))
    found = session.run(None, inputs)
    references = [[output.numpy() for output in outputs] for outputs in expected]
    if model.task == "module":
        return list(zip(found, references[0], strict=True))
    if model.task == "seq2seq-lm":
        return _stepwise(model, session, inputs, found, np.concatenate([logits for (logits,) in references]))
    pairs: list[tuple[np.ndarray[Any, Any], ...]] = []
    for output, *rows in zip(found, *references, strict=False):  # caches follow a decoder's logits
        by_token = len({reference.shape[1] for reference in rows}) > 1  # or one vector per sentence
        for row, (reference, length) in enumerate(zip(rows, LENGTHS, strict=True)):
            pairs.append((output[row, :length], reference[0, :length]) if by_token else (output[row], reference[0]))
    if model.task == "causal-lm":
        step = np.array(NEXT_TOKENS)[:, None] % vocabulary_size(model)
        logits, *_ = session.run(None, next_inputs(session, inputs, found, step))
        pairs += [(logits[row, 0], references[row][0][0, length]) for row, length in enumerate(LENGTHS)]
    return pairs


def _stepwise(
    model: Model,
    session: Any,
    inputs: Values,
    found: Sequence[np.ndarray[Any, Any]],
    reference: np.ndarray[Any, Any],
) -> list[tuple[np.ndarray[Any, Any], ...]]:
    """Of the first run and of every step after it. reference: logits [rows, all tokens, vocabulary]."""
    tokens = torch.cat([batch["decoder_input_ids"] for batch in probes(model)]).numpy()
    read = DECODER_STEPS[0]
    pairs: list[tuple[np.ndarray[Any, Any], ...]] = [(found[0], reference[:, :read])]
    for count in DECODER_STEPS[1:]:
        inputs = next_inputs(session, inputs, found, tokens[:, read : read + count])
        found = session.run(None, inputs)
        pairs.append((found[0], reference[:, read : read + count]))
        read += count
    return pairs
