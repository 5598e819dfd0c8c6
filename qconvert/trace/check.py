"""Whether a traced graph computes what the model computes: the traced blocks are run both ways on real weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from qconvert.ir.float_graph import float_graph
from qconvert.ir.model import Model
from qconvert.ir.runtime import memory_session
from qconvert.trace.capture import Captured
from qconvert.trace.opaque import original_name, shortened

# Relative to the largest |output|; float32 sums in another order differ by about 1e-6.
TOLERANCE = 1e-4

# Rows of different length, padded on the right: the second has to ignore what is not there.
LENGTHS = (9, 6)


def relative_error(model: Model, captured: Captured, blocks: list[str]) -> float:
    """Largest difference of the graph's outputs to torch's, relative to the largest |output|."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.module.named_parameters()}

    def read(name: str) -> Tensor:
        return captured.constants[name] if name in captured.constants else model.read(name)

    # Prepacking would copy the largest tensors for a single use.
    session = memory_session(
        float_graph(captured.graph, shapes), read, config={"session.disable_prepacking": "1"}
    )
    module = _materialized(model, blocks)
    with torch.no_grad():
        if model.task == "causal-lm":
            return _check_causal_lm(session, module)
        if model.task == "encoder":
            return _check_encoder(session, module, model)
        inputs = {name: value[:2] for name, value in model.example_inputs.items()}
        output = module(**inputs)
        expected = [output] if isinstance(output, Tensor) else list(output)
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return max(_difference(a, b.numpy()) for a, b in zip(found, expected, strict=True))


def _materialized(model: Model, blocks: list[str]) -> nn.Module:
    module = shortened(model, blocks)
    for name, _ in list(module.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        value = model.read(original_name(name, blocks)).float()
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return module


def _difference(found: np.ndarray, expected: np.ndarray) -> float:  # type: ignore[type-arg]
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))


def _tokens(vocabulary: int, length: int, row: int) -> Tensor:
    return (torch.arange(length) * 7919 + 13 * row + 5) % vocabulary


def _padded(vocabulary: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [rows, longest]."""
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = _tokens(vocabulary, length, row)
        mask[row, :length] = 1
    return ids, mask


def _check_causal_lm(session: object, module: nn.Module) -> float:
    """A padded prefill, then one decode step on its cache, against full forwards of each row."""
    vocabulary = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids, mask = _padded(vocabulary)
    caches = {value.name: value for value in session.get_inputs() if value.name.startswith("past_key_values.")}  # type: ignore[attr-defined]
    empty = {
        name: np.zeros((len(LENGTHS), value.shape[1], 0, value.shape[3]), np.float32) for name, value in caches.items()
    }
    logits, *present = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **empty})  # type: ignore[attr-defined]
    errors = []
    step = torch.tensor([[3], [4]])
    longer = torch.cat((mask, torch.ones(len(LENGTHS), 1, dtype=torch.long)), 1)
    cache: Mapping[str, np.ndarray] = dict(zip(empty, present, strict=True))  # type: ignore[type-arg]
    next_logits, *_ = session.run(None, {"input_ids": step.numpy(), "attention_mask": longer.numpy(), **cache})  # type: ignore[attr-defined]
    for row, length in enumerate(LENGTHS):
        row_ids = torch.cat((ids[row, :length], step[row]))[None]
        expected = module(input_ids=row_ids, use_cache=False).logits.numpy()[0]
        errors.append(_difference(logits[row, :length], expected[:length]))
        errors.append(_difference(next_logits[row, 0], expected[length]))
    return max(errors)


def _check_encoder(session: object, module: nn.Module, model: Model) -> float:
    vocabulary = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids, mask = _padded(vocabulary)
    inputs = {name: torch.zeros_like(ids) for name in model.input_names} | {"input_ids": ids, "attention_mask": mask}
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})  # type: ignore[attr-defined]
    output = module(**inputs, output_hidden_states=True)
    hidden = output["last_hidden_state"] if "last_hidden_state" in output else output.hidden_states[-1]
    valid = mask.bool().numpy()
    errors = [_difference(found[0][valid], hidden.numpy()[valid])]
    if len(found) > 1 and found[1].ndim == 3:
        errors.append(_difference(found[1][valid], output.logits.numpy()[valid]))
    elif len(found) > 1:
        errors.append(_difference(found[1], output.logits.numpy()))
    return max(errors)
