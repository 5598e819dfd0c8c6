"""Pieces of a graph with a large weight: looked up or multiplied where it lies, or multiplied a tile of its rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir
import onnxruntime
import torch
from torch import Tensor

from qconvert.execution.wide_rows import Rows, is_large, tiles
from qconvert.ort.fed_session import FedSession, made_input
from qconvert.ort.pieces import OpenPiece
from qconvert.ort.session import PROVIDERS, SessionSettings, empty, ort_value, session_options
from qconvert.targets.cpu import CPU


@dataclass(frozen=True, slots=True)
class LargeProduct:
    """The one product of a graph. weight: [out, in], the graph's only one. axis: of the output, that is `out` long."""

    weight: onnx_ir.Value
    axis: int


def fed_if_large(read: Callable[[str], Tensor], settings: SessionSettings, otherwise: OpenPiece) -> OpenPiece:
    """Return what opens a session over a piece of a graph, as fast as `otherwise`.

    Where kernels read all weights of a piece in place, and one is large, they are handed to every run. A session would
    copy them.
    """

    def open_piece(piece: onnx_ir.Model) -> Any:
        weights = list(piece.graph.initializers.values())
        in_place = all(map(_is_read_in_place, weights)) and any(map(_is_large, weights))
        return FedSession(piece, read, settings) if in_place else otherwise(piece)

    return open_piece


def in_tiles(read: Callable[[str], Rows], otherwise: OpenPiece) -> OpenPiece:
    """Return what opens a session over a piece of a graph: over a large product one in tiles.

    read: gives a weight by its name. otherwise: opens one over any other piece.
    """

    def open_piece(piece: onnx_ir.Model) -> Any:
        product = large_product(piece.graph)
        return otherwise(piece) if product is None else TiledSession(piece, product, read(str(product.weight.name)))

    return open_piece


def large_product(graph: onnx_ir.Graph) -> LargeProduct | None:
    """Return what a graph computes where that is a product with a large weight, on either side (see graph/float_graph.py)."""
    last, weights = graph[-1], list(graph.initializers.values())
    if last.op_type != "MatMul" or list(graph.outputs) != list(last.outputs) or len(weights) != 1:
        return None
    (weight,) = weights
    if not _is_large(weight):
        return None
    left, right = last.inputs
    transpose = None if right is None else right.producer()
    if left is weight:
        return LargeProduct(weight, -2)
    return LargeProduct(weight, -1) if transpose is not None and transpose.inputs[0] is weight else None


def _is_large(weight: onnx_ir.Value) -> bool:
    """Return whether it is a large weight that a source is to give."""
    return isinstance(weight.const_value, onnx_ir.LazyTensor) and is_large(weight.const_value.shape.numpy())


def _is_read_in_place(weight: onnx_ir.Value) -> bool:
    """Return whether nodes only look up its rows, or multiply it from the left: no kernel packs it for that. Nor any vector."""
    if weight.shape is not None and len(weight.shape) < 2:
        return True
    return all(place == 0 and node.op_type in ("Gather", "MatMul") for node, place in weight.uses())


class TiledSession:
    """A session over such a graph. Each run widens all tiles, one after the other: of the weight, one is held in float32."""

    def __init__(self, model: onnx_ir.Model, product: LargeProduct, rows: Rows) -> None:
        self._name, self._axis, self._rows = str(product.weight.name), product.axis, rows
        clone = model.clone()
        made_input(clone.graph, self._name).shape = onnx_ir.Shape((None, rows.shape[1]))
        clone.graph.outputs[0].shape = None  # as long as a tile, not as the weight
        data = onnx_ir.to_proto(clone).SerializeToString()
        options = session_options()
        self._session: Any = onnxruntime.InferenceSession(data, options, providers=[PROVIDERS[CPU.name]])

    def run_with_ort_values(self, outputs: Sequence[str], feeds: dict[str, Any]) -> list[Any]:
        """Run the graph on values of onnxruntime, and return that of `outputs`, which is one."""
        # Of onnxruntime's own memory: an array that `numpy()` gives does not keep one alive that a value was made from.
        product = None
        for rows in tiles(self._rows.shape):
            tile = ort_value(self._rows[rows].to(torch.float32).numpy())
            found = self._session.run_with_ort_values(outputs, feeds | {self._name: tile})[0].numpy()
            if product is None:
                shape = list(found.shape)
                shape[self._axis] = self._rows.shape[0]
                product = empty(shape, "tensor(float)")
            place = (..., rows) if self._axis == -1 else (..., rows, slice(None))
            product.numpy()[place] = found
        return [product]
