"""Whether an ONNX graph and a torch model compute the same, on a few rows of different length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qconvert.ir.layer import Batch
from qconvert.ir.model import Model

# Rows of different length, padded on the right: the second has to ignore what is not there.
LENGTHS = (9, 6)

Forward = Callable[[Batch], Tensor]


def largest_difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """max |found - expected| / max |expected|; infinite where shapes differ or a value is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all() or not np.isfinite(expected).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))


def probe_batch(model: Model) -> Batch:
    """Two rows of inputs: token ids of different length, or the first example inputs."""
    if model.task == "module":
        return {name: value[:2] for name, value in model.example_inputs.items()}
    vocabulary = vocabulary_size(model)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = (torch.arange(length) * 7919 + 13 * row + 5) % vocabulary
        mask[row, :length] = 1
    others = {name: torch.zeros_like(ids) for name in model.input_names}
    return others | {"input_ids": ids, "attention_mask": mask}


def vocabulary_size(model: Model) -> int:
    """Rows of the input embedding."""
    embedding = model.module.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def feed(session: Any, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """The session's inputs from a batch, with empty KV caches where it has them."""
    inputs = {name: value.numpy() for name, value in batch.items()}
    rows = next(iter(inputs.values())).shape[0]
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            inputs[value.name] = np.zeros((rows, value.shape[1], 0, value.shape[3]), np.float32)
    return inputs


def relative_error(model: Model, session: Any, forward: Forward) -> float:
    """Largest difference between the session's outputs and `forward`'s, relative to the largest |output|.

    forward: the reference, called with model inputs, giving the first output.
    Decoders also take one step on the cache of a padded prefill; encoders count only positions that are not padding.
    """
    batch = probe_batch(model)
    inputs = feed(session, batch)
    first, *rest = session.run(None, inputs)
    if model.task == "module":
        return largest_difference(first, forward(batch).numpy())
    valid = batch["attention_mask"].bool().numpy()
    if model.task == "encoder":
        return largest_difference(first[valid], forward(batch).numpy()[valid])
    caches = dict(zip((name for name in inputs if name.startswith("past_key_values.")), rest, strict=True))
    step = torch.tensor([[3], [4]]) % vocabulary_size(model)
    mask = torch.cat((batch["attention_mask"], torch.ones(len(LENGTHS), 1, dtype=torch.long)), 1)
    next_logits, *_ = session.run(None, {"input_ids": step.numpy(), "attention_mask": mask.numpy(), **caches})
    errors = []
    for row, length in enumerate(LENGTHS):
        ids = torch.cat((batch["input_ids"][row, :length], step[row]))[None]
        expected = forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).numpy()[0]
        errors.append(largest_difference(first[row, :length], expected[:length]))
        errors.append(largest_difference(next_logits[row, 0], expected[length]))
    return max(errors)
