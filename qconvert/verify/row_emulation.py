"""The arithmetic of layers with int8 activations, in torch: exact integer products, one activation scale per row."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from qconvert.ir import activations
from qconvert.ir.layer_form import LayerForm
from qconvert.ir.prompt_weights import LEVELS, LEVELS_WITHOUT_VNNI, prompt_weights
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ort.processor import processor
from qconvert.storage.artifact_reader import ArtifactReader


class Cluster(NamedTuple):
    """The nodes that compute one layer with int8 activations, or several whose channels follow one another.

    x, y: names of what it reads and gives. maker: type of the node that gives x. with_rest: whether what the codes of a row
    leave over is quantized and multiplied too.
    """

    layers: list[str]
    x: str
    maker: str | None
    y: str
    with_rest: bool = False


def emulated_cluster(artifact: ArtifactReader, cluster: Cluster, rows: Tensor) -> Tensor:
    """Return what a cluster should give for `rows` [..., in]: [..., out].

    Packed weights are multiplied as int8 weights that are derived from them, on the processor at hand.
    """
    outputs = []
    for name in cluster.layers:
        tensor = artifact.layer(name)
        if artifact.plan.form_of(name) is LayerForm.PACKED_WEIGHTS:
            levels = LEVELS if processor().signed_products == "exact" else LEVELS_WITHOUT_VNNI
            codes, step = prompt_weights(tensor, levels)
            tensor = dataclasses.replace(tensor, q=codes, scale=step, zero_point=None)
        bias = artifact.read(f"{name}.bias").float() if f"{name}.bias" in artifact.tensors else None
        outputs.append(emulate_row_form(rows, tensor, bias, cluster.maker, with_rest=cluster.with_rest))
    return torch.cat(outputs, -1)


def emulate_row_form(
    x: Tensor, tensor: QuantizedTensor, bias: Tensor | None, maker: str | None = None, *, with_rest: bool = False
) -> Tensor:
    """Compute y [..., out] of x [..., in] as the int8 kernels do.

    tensor: with a scale for each row. maker, with_rest: see `Cluster`.
    """
    rows = activations.row_codes(maker if tensor.smoothing_scale is None else None)
    if tensor.smoothing_scale is not None:
        x = x * (1 / tensor.smoothing_scale)
    kept = x
    if tensor.outliers is not None:
        kept = x.clone()
        kept[..., tensor.outliers.columns] = 0
    codes, step = _row_codes(kept, rows)
    y = _product(codes, step, tensor)
    if with_rest:
        y = y + _product(*_row_codes(kept - codes * step, activations.SYMMETRIC_ROWS), tensor)
    if tensor.outliers is not None:
        y = y + (x[..., tensor.outliers.columns] @ tensor.outliers.weight.T).double()
    return (y if bias is None else y + bias.double()).float()


def _row_codes(x: Tensor, rows: activations.RowCodes) -> tuple[Tensor, Tensor]:
    """(codes [..., in] around 0, step of each row [..., 1])."""
    step = rows.step_of(x)
    return torch.round(x / step).nan_to_num(), step  # a row of zeros; it is multiplied by 0 afterwards


def _product(codes: Tensor, step: Tensor, tensor: QuantizedTensor) -> Tensor:
    weight = tensor.q.double()
    if tensor.zero_point is not None:
        weight = weight - tensor.zero_point.double()
    product = codes.double() @ weight.T  # exact: integers below 2^53
    return product * tensor.scale.expand(len(weight), -1)[:, 0].double() * step.double()
