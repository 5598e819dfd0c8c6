"""Graphs that give the logits of the last position alone: compared at all positions, and then with themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from torch import Tensor

from qconvert.execution import probes
from qconvert.graph.last_position import keeps_last_position, restore_all_positions
from qconvert.graph.phases import Phase, phase_of
from qconvert.ir.model import Model
from qconvert.ort import compare
from qconvert.ort.session import DEFAULT, SessionSettings, Values, file_session, memory_session


def session_at_all_positions(path: Path, target: str, settings: SessionSettings = DEFAULT, phase: Phase | None = None) -> Any:
    """Open a session over a graph as it ships, but that gives logits at all positions: [batch, sequence, vocabulary].

    phase: whose body is run, of a graph that has several, for any number of tokens; None lets the graph choose.
    """
    model = onnx_ir.load(path)
    if phase is None and not keeps_last_position(model.graph):
        return file_session(path, target, settings)
    restore_all_positions(model.graph)
    return _whole_session(model, path, target, settings, phase)


def phase_session(path: Path, target: str, phase: Phase | None) -> Any:
    """Open a session over a graph as it ships, or over its body for one phase."""
    return file_session(path, target) if phase is None else _whole_session(onnx_ir.load(path), path, target, DEFAULT, phase)


def _whole_session(model: onnx_ir.Model, path: Path, target: str, settings: SessionSettings, phase: Phase | None) -> Any:
    chosen = model if phase is None else phase_of(model, phase)
    return memory_session(chosen, _nothing_to_read, settings, folder=path.parent, target=target)


def last_position_pairs(
    model: Model, path: Path, target: str, phase: Phase | None = None
) -> list[tuple[np.ndarray[Any, Any], ...]]:
    """Return (logits that the graph gives, those of the same graph at the last token of each row): of a prompt whose rows are
    padded on the right, then on the left, and of steps on its caches; [] for a graph that gives all positions.
    """
    if not keeps_last_position(onnx_ir.load(path).graph):
        return []
    every = session_at_all_positions(path, target, phase=phase)
    step = np.array(probes.NEXT_TOKENS)[:, None] % probes.vocabulary_size(model)
    runs: list[tuple[Values, np.ndarray[Any, Any]]] = []
    for side in probes.SIDES:
        inputs = compare.feed(every, probes.padded_batch(model, side))
        expected = every.run(None, inputs)
        ends = [probes.columns_of(row, side).stop - 1 for row in range(len(step))]
        runs.append((inputs, expected[0][np.arange(len(ends)), ends][:, None]))
        inputs = compare.next_inputs(every, inputs, expected, step)
        runs.append((inputs, every.run(None, inputs)[0]))
    del every  # two sessions at once would be twice the memory
    last = phase_session(path, target, phase)
    return [(last.run(None, inputs)[0], logits) for inputs, logits in runs]


def _nothing_to_read(name: str) -> Tensor:
    raise AssertionError(f"{name}: a graph that ships has all its weights")
