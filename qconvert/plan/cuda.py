"""What is known of the graph for CUDA before anything is quantized: whether there are kernels, and what it adds to the disk."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from onnx_ir import DataType

from qconvert.graph import cuda_kernels
from qconvert.graph.float_graph import float_graph
from qconvert.graph.half_precision import narrow
from qconvert.graph.last_position import keep_last_position
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan
from qconvert.ir.scheme import no_zero_points
from qconvert.ir.template import Template
from qconvert.targets import cuda
from qconvert.vocabulary import Logits


def check_cuda(model: Model, template: Template, layers: Mapping[str, LayerPlan], dtype: str, logits: Logits) -> None:
    """Raises UsageError QC-PLAN-007 for zero points, and QC-CUDA-001 if something between the layers has no kernel: the graph
    is made with its layers in float, and checked.
    QC-CUDA-002 for a constant of the model that `dtype` can't hold.
    """
    for layer in layers.values():
        if not layer.scheme.symmetric:
            raise no_zero_points(layer.scheme, layer.name)
    for part in template.graphs.values():
        made = part.clone()
        if logits == "last" and model.output_head is not None:
            keep_last_position(made.graph, model.output_head)
        graph = float_graph(made, model.parameter_shapes).graph
        narrow(graph, DataType[dtype.upper()])
        cuda_kernels.check_kernels(graph)


def cuda_bytes(model: Model, layers: Mapping[str, LayerPlan], dtype: str) -> int:
    """Bytes that the graph for CUDA adds to the sidecar, but for small constants."""
    narrow_type: torch.dtype = getattr(torch, dtype)
    replaced = {model.stored_name(f"{name}.weight") for name in layers}
    total = sum(
        info.nbytes // info.dtype.itemsize * narrow_type.itemsize
        for name, info in model.source.tensors.items()
        if name not in replaced and info.dtype.is_floating_point and info.dtype != narrow_type
    )
    for layer in layers.values():
        if layer.kind == "conv2d":
            continue
        blocks = -(-layer.in_features // cuda.block_size(layer))
        scale = layer.disk_tensors["weight_scale"]
        if scale.dtype != narrow_type or scale.shape[1] != blocks:
            total += layer.out_features * blocks * narrow_type.itemsize
        if cuda.is_padded(layer):
            total += layer.out_features * blocks * cuda.block_size(layer) * layer.scheme.bits // 8
    return total
