"""A graph in memory whose weights are handed to every run, so that nothing copies them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
from torch import Tensor

from qconvert.ort.session import DEFAULT, PROVIDERS, SessionSettings, Values, fed_weights, ort_value, session_options
from qconvert.targets.cpu import CPU


def made_input(graph: onnx_ir.Graph, name: str) -> onnx_ir.Value:
    """Make an initializer an input of its graph, and return it."""
    value = graph.initializers.pop(name)
    value.const_value = None
    graph.inputs.append(value)
    return value


class FedSession:
    """A session over a graph in memory, for few runs: initializers without data (see ir/template.py) are inputs of the graph,
    which a session neither folds nor packs into the order of its kernels. Measured with a head of 1.05 GB: as initializers
    its weights are held three times, and four if a Transpose precedes the product.
    """

    def __init__(self, model: onnx_ir.Model, read: Callable[[str], Tensor], settings: SessionSettings = DEFAULT) -> None:
        """read: see ort.session.memory_session."""
        clone = model.clone()
        self._weights = fed_weights(clone.graph, read)
        for name in self._weights:
            made_input(clone.graph, name)
        data = onnx_ir.to_proto(clone).SerializeToString()
        options = session_options(settings)
        self._session: Any = onnxruntime.InferenceSession(data, options, providers=[PROVIDERS[CPU.name]])

    def get_inputs(self) -> list[Any]:
        """Return the graph's own inputs."""
        return [value for value in self._session.get_inputs() if value.name not in self._weights]

    def get_outputs(self) -> Any:
        """Return the graph's outputs."""
        return self._session.get_outputs()

    def run(self, names: None, feeds: Values) -> list[np.ndarray[Any, Any]]:
        """Run the graph, and return its outputs in order."""
        outputs = [value.name for value in self.get_outputs()]
        given = {name: ort_value(value) for name, value in feeds.items()}
        return [value.numpy() for value in self.run_with_ort_values(outputs, given)]

    def run_with_ort_values(self, outputs: Sequence[str], feeds: dict[str, Any]) -> Any:
        """Run the graph on values of onnxruntime, and return those of `outputs`."""
        return self._session.run_with_ort_values(outputs, feeds | self._weights)
