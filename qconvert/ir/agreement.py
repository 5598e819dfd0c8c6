"""Whether an ONNX graph and a torch model compute the same, on a few rows of different length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qconvert.ir.layer import Batch
from qconvert.ir.model import Model
from qconvert.ir.runtime import empty

# Rows of different length, padded on the right: the second has to ignore what is not there.
LENGTHS = (9, 6)

# The token after each row, for one decode step on the cache.
NEXT_TOKENS = (3, 4)


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
    batches = []
    for row, length in enumerate(LENGTHS):
        ids = (torch.arange(length) * 7919 + 13 * row + 5) % vocabulary
        if model.task == "causal-lm":
            ids = torch.cat((ids, torch.tensor([NEXT_TOKENS[row] % vocabulary])))
        others = {name: torch.zeros(1, len(ids), dtype=torch.long) for name in model.input_names}
        batches.append(others | {"input_ids": ids[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.long)})
    return batches


def padded_batch(model: Model) -> Batch:
    """The rows of `probes` as one batch, padded on the right; for decoders without their last token."""
    rows = probes(model)
    if model.task == "module":
        return rows[0]
    batch = {}
    for name in rows[0]:
        batch[name] = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
        for row, length in enumerate(LENGTHS):
            batch[name][row, :length] = rows[row][name][0, :length]
    return batch


def feed(session: Any, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The session's inputs from a batch, with empty KV caches where it has them."""
    inputs = {name: value.numpy() for name, value in batch.items()}
    rows = next(iter(inputs.values())).shape[0]
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            inputs[value.name] = empty((rows, value.shape[1], 0, value.shape[3]), value.type)
    return inputs


def relative_error(model: Model, session: Any, expected: Sequence[tuple[Tensor, ...]]) -> float:
    """Largest difference between the session's outputs and the reference, each relative to its largest |output|."""
    return max(largest_difference(found, reference) for found, reference in compared(model, session, expected))


def compared(model: Model, session: Any, expected: Sequence[tuple[Tensor, ...]]) -> list[tuple[np.ndarray[Any, Any], ...]]:
    """(output of the session, what it should be), row by row for text models.

    expected: the reference's outputs (see ir.forward.graph_outputs) for each of `probes(model)`.
    The session gets the padded batch; decoders then take one step on its cache. Padding itself is not compared.
    """
    inputs = feed(session, padded_batch(model))
    found = session.run(None, inputs)
    references = [[output.numpy() for output in outputs] for outputs in expected]
    if model.task == "module":
        return list(zip(found, references[0], strict=True))
    pairs: list[tuple[np.ndarray[Any, Any], ...]] = []
    for row, length in enumerate(LENGTHS):
        for output, reference in zip(found, references[row], strict=False):  # caches follow a decoder's logits
            if reference.ndim == 2:  # one vector per sentence
                pairs.append((output[row], reference[0]))
            else:
                pairs.append((output[row, :length], reference[0, :length]))
    if model.task == "causal-lm":
        caches = dict(zip((name for name in inputs if name.startswith("past_key_values.")), found[1:], strict=True))
        step = np.array(NEXT_TOKENS)[:, None] % vocabulary_size(model)
        mask = np.concatenate((inputs["attention_mask"], np.ones_like(step)), 1)
        logits, *_ = session.run(None, {"input_ids": step, "attention_mask": mask, **caches})
        pairs += [(logits[row, 0], references[row][0][0, length]) for row, length in enumerate(LENGTHS)]
    return pairs
