"""The weights of an artifact, as a model computes with them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qconvert.execution.modules import in_own_shape
from qconvert.ir.artifact import StoredTensor
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.quantized import QuantizedTensor
from qconvert.storage.reader import read_layer, read_tensor


class ArtifactReader:
    """The written weights of one folder, as torch sees them.

    folder: an output folder or a stage; tensors: where everything lies in it.
    """

    def __init__(self, folder: Path, model: Model, plan: Plan, tensors: dict[str, StoredTensor]) -> None:
        self.folder, self.model, self.plan, self.tensors = folder, model, plan, tensors

    @property
    def has_outliers(self) -> bool:
        """Whether any layer keeps float columns in the sidecar."""
        return any(f"{name}.outlier_columns" in self.tensors for name in self.plan.layers)

    def layer(self, name: str) -> QuantizedTensor:
        """Return the quantized tensor of the planned module `name`."""
        layer = self.plan.layer_of(name)
        assert layer is not None
        return read_layer(self.folder, layer, self.tensors)

    def read(self, parameter: str) -> Tensor:
        """Return a parameter in the module's shape, dequantized with outliers and smoothing scale put in."""
        name = self._layer_name(parameter)
        if name is not None:
            return in_own_shape(self.model.module.get_submodule(name), self.layer(name).dequantize())
        return read_tensor(self.folder, self.tensors[self.model.stored_name(parameter)])

    def read_plain(self, parameter: str) -> Tensor:
        """Return what `read` does, but as a loader that knows nothing of outliers sees it."""
        name = self._layer_name(parameter)
        if name is not None:
            tensor = self.layer(name)
            plain = QuantizedTensor(tensor.q, tensor.scale, tensor.zero_point, tensor.scheme)
            return in_own_shape(self.model.module.get_submodule(name), plain.dequantize())
        return self.read(parameter)

    def _layer_name(self, parameter: str) -> str | None:
        stored = self.model.stored_name(parameter)
        layer = self.plan.layer_of(stored.removesuffix(".weight")) if stored.endswith(".weight") else None
        return None if layer is None else layer.name
