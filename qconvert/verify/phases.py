"""Graphs with a body for prompts and one for decoding: what they choose, compared with the bodies themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from qconvert.execution import probes
from qconvert.graph.phases import MOST_DECODED, Phase, phases_of
from qconvert.ir.model import Model
from qconvert.ort import compare
from qconvert.ort.session import Values
from qconvert.verify.last_position import phase_session


def choice_pairs(model: Model, path: Path, target: str) -> list[tuple[np.ndarray[Any, Any], ...]]:
    """Return (what a graph gives, what the body gives that it should choose), logits and caches: of a prompt, and of a step on
    its caches; [] for a graph with one body.
    """
    if not phases_of(onnx_ir.load(path).graph):
        return []
    whole = phase_session(path, target, None)
    inputs = compare.feed(whole, probes.padded_batch(model))
    step = np.array(probes.NEXT_TOKENS)[:, None] % probes.vocabulary_size(model)
    assert inputs["input_ids"].shape[1] > MOST_DECODED
    found = whole.run(None, inputs)
    after = compare.next_inputs(whole, inputs, found, step)
    runs: dict[Phase, tuple[Values, Any]] = {"prompt": (inputs, found), "decode": (after, whole.run(None, after))}
    return [
        pair
        for phase, (given, outputs) in runs.items()
        for pair in zip(outputs, phase_session(path, target, phase).run(None, given), strict=True)
    ]
