"""Graphs whose question to the processor is answered beforehand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from qconvert.export import processors
from qconvert.graph.integer_products import PROBE


def forced(path: Path, *, exact: bool) -> Path:
    """A copy of the graph, beside it, whose question to the processor is always answered in one way."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name.startswith(f"{processors.EXACT}/factor"):
            factor = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.ones_like(factor), tensor.name))
        if tensor.name == f"{processors.EXACT}/expected":
            width = len(PROBE[1]) if exact else -1
            tensor.CopyFrom(numpy_helper.from_array(np.array(width, np.int32), tensor.name))
    copy = path.with_name(f"{path.stem}.{'signed' if exact else 'unsigned'}.onnx")
    onnx.save(model, copy)
    return copy
