"""The codes of static activations: those that integer kernels make, against float kernels on the codes that they were given.

The graph as it ships is run, and all codes in it are looked at. Then every stretch of it between codes is run by itself, on
the codes that it had, with the optimizations of ONNX Runtime switched off: what is dequantized is then multiplied in float.
A code may differ by one, where a value lies on the border of two. Kernels that saturate differ by tens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir import Value

from qconvert.execution import probes
from qconvert.graph.phases import Phase
from qconvert.graph.static_codes import static_codes
from qconvert.ort import compare
from qconvert.ort.session import SessionSettings, joined, memory_session, run_named, run_parts
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.targets.target import Target
from qconvert.verify.parity import target_graphs

AS_THEY_ARE = SessionSettings(optimized=False)
AGAIN = "/again"


def worst_codes(artifact: ArtifactReader, target: Target, phase: Phase | None = None) -> tuple[float, str]:
    """Return (the largest difference of codes beyond one, or of outputs, relative to the largest; of what)."""
    how = artifact.plan.activations
    if how is None:
        return 0.0, ""
    graphs = target_graphs(artifact, target, phase)
    outputs = {part: [str(value.name) for value in graph.graph.outputs] for part, graph in graphs.items()}
    codes = {part: [str(value.name) for value in static_codes(graph.graph)] for part, graph in graphs.items()}
    if not any(codes.values()):
        return 0.0, ""
    opened = partial(memory_session, read=artifact.read, folder=artifact.folder, target=target.name)
    session = joined({part: opened(_shown(graph)) for part, graph in graphs.items()})
    inputs = compare.feed(session, probes.padded_batch(artifact.model))
    values = run_parts(session, inputs)
    errors = []
    for part, graph in graphs.items():
        known = values[part]
        again = run_named(opened(_cut(graph), settings=AS_THEY_ARE), known)
        errors += [
            (_beyond_one(known[name], again[name + AGAIN], how.codes), f"codes of {name.removesuffix('/codes')}")
            for name in codes[part]
        ]
        errors += [
            (compare.largest_difference(known[name], again[name]), f"{name}, computed from static activations,")
            for name in outputs[part]
        ]
    return max(errors)


def _shown(model: onnx_ir.Model) -> onnx_ir.Model:
    """The graph with its codes as outputs."""
    shown = model.clone()
    shown.graph.outputs.extend(static_codes(shown.graph))
    return shown


def _cut(model: onnx_ir.Model) -> onnx_ir.Model:
    """The graph in which whatever reads codes takes them from an input, beside which they are made once more."""
    cut = model.clone()
    for value in static_codes(cut.graph):
        name = str(value.name)
        given = Value(name=name, shape=value.shape, type=value.type)
        onnx_ir.convenience.replace_all_uses_with(value, given)
        value.name = name + AGAIN
        cut.graph.inputs.append(given)
        cut.graph.outputs.append(value)
    return cut


def _beyond_one(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], count: int) -> float:
    """The largest difference of codes, beyond one, as a share of the largest of `count`; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    largest = np.abs(found.astype(np.int64) - expected.astype(np.int64)).max(initial=0)
    return max(float(largest) - 1, 0.0) / (count - 1)
