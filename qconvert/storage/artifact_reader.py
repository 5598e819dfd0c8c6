"""The weights of an artifact, as a model computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qconvert.execution.modules import in_own_shape
from qconvert.execution.wide_rows import Rows, is_large
from qconvert.ir.artifact import StoredTensor
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan, Plan
from qconvert.ir.quantized import QuantizedTensor
from qconvert.storage.reader import map_tensor, read_layer, read_tensor


class DequantizedRows:
    """The rows of a quantized layer, dequantized when they are asked for.

    with_outliers: whether columns that stay in float are put in, which a loader that knows nothing of them does not do.
    """

    def __init__(self, folder: Path, plan: LayerPlan, tensors: Mapping[str, StoredTensor], *, with_outliers: bool) -> None:
        self.folder, self.plan, self.tensors, self.with_outliers = folder, plan, tensors, with_outliers

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return torch.Size((self.plan.out_features, self.plan.in_features))

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Return rows in float32."""
        tensor = read_layer(self.folder, self.plan, self.tensors, rows)
        return (tensor if self.with_outliers else replace(tensor, smoothing_scale=None, outliers=None)).dequantize()


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
        return read_layer(self.folder, self._planned(name), self.tensors)

    def rows(self, name: str) -> DequantizedRows:
        """Return what gives the rows of `layer(name)` in float32."""
        return DequantizedRows(self.folder, self._planned(name), self.tensors, with_outliers=True)

    def read(self, parameter: str) -> Tensor:
        """Return a parameter in the module's shape, dequantized with outliers and smoothing scale put in."""
        return self._whole(parameter, with_outliers=True)

    def read_plain(self, parameter: str) -> Tensor:
        """Return what `read` does, but as a loader that knows nothing of outliers sees it."""
        return self._whole(parameter, with_outliers=False)

    def open(self, parameter: str, *, with_outliers: bool = True) -> Tensor | Rows:
        """Return what `read` does, or `read_plain`; of a large matrix, what gives its rows."""
        found = self._rows(parameter, with_outliers=with_outliers)
        if found is not None:
            by_rows = is_large(found.shape) and found.plan.kind in ("linear", "embedding")
            return found if by_rows else self._in_own_shape(found)
        stored = self.tensors[self.model.stored_name(parameter)]
        return map_tensor(self.folder, stored) if is_large(stored.shape) else read_tensor(self.folder, stored)

    def _planned(self, name: str) -> LayerPlan:
        layer = self.plan.layer_of(name)
        assert layer is not None
        return layer

    def _whole(self, parameter: str, *, with_outliers: bool) -> Tensor:
        found = self._rows(parameter, with_outliers=with_outliers)
        if found is None:
            return read_tensor(self.folder, self.tensors[self.model.stored_name(parameter)])
        return self._in_own_shape(found)

    def _in_own_shape(self, rows: DequantizedRows) -> Tensor:
        return in_own_shape(self.model.module.get_submodule(rows.plan.name), rows[:])

    def _rows(self, parameter: str, *, with_outliers: bool) -> DequantizedRows | None:
        stored = self.model.stored_name(parameter)
        layer = self.plan.layer_of(stored.removesuffix(".weight")) if stored.endswith(".weight") else None
        return None if layer is None else DequantizedRows(self.folder, layer, self.tensors, with_outliers=with_outliers)
