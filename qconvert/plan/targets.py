"""The demands of targets before anything is quantized: whether there are kernels, and what a graph adds to the disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from onnx_ir import DataType

from qconvert.errors import UsageError
from qconvert.graph import cuda_kernels
from qconvert.graph.float_graph import float_graph
from qconvert.graph.half_precision import narrow
from qconvert.graph.last_position import keep_last_position
from qconvert.ir.layer_form import LayerForm
from qconvert.ir.model import Model, TensorInfo
from qconvert.ir.plan import LayerPlan
from qconvert.ir.scheme import no_codebooks, no_zero_points
from qconvert.ir.template import Template
from qconvert.recipe import Recipe
from qconvert.targets import targets_of
from qconvert.targets.cuda import CUDA
from qconvert.targets.target import Target


def check_targets(model: Model, template: Template, layers: Mapping[str, LayerPlan], recipe: Recipe) -> None:
    """Check that the kernels of the recipe's targets can run what is planned.

    Raises UsageError QC-PLAN-007 for zero points that a target does not take, QC-PLAN-012 for static activations that it does
    not, QC-PLAN-013 where these are not all alike, QC-PLAN-015 for codebooks that it does not take; QC-CUDA-001 if something
    between the layers has no kernel (the graph is made with its layers in float, and checked), and QC-CUDA-002 for a constant
    of the model that the type of activations can't hold.
    """
    targets = targets_of(recipe.targets)
    _check_static(layers.values(), targets)
    for layer in layers.values():
        if not layer.scheme.symmetric and not all(target.takes_zero_points for target in targets):
            raise no_zero_points(layer.scheme, layer.name)
        without = next((target.name for target in targets if not target.takes_codebooks), None)
        if layer.scheme.codebook is not None and without:
            raise no_codebooks(layer.scheme, layer.name, without)
    if any(target.half_precision for target in targets):
        _check_kernels(model, template, recipe)


def _check_static(layers: Iterable[LayerPlan], targets: Iterable[Target]) -> None:
    """A value may be read by several layers, and has codes of one kind."""
    static = [layer for layer in layers if layer.scheme.is_static]
    for layer in static:
        if layer.scheme.activations != static[0].scheme.activations:
            raise UsageError(
                "QC-PLAN-013",
                f"{layer.name} ({layer.scheme}) and {static[0].name} ({static[0].scheme}) have static activations of two kinds",
                hint=f"take {static[0].scheme.activations} for both, or keep one of them in float with a rule",
            )
    missing = [target.name for target in targets if not target.takes_static]
    if static and missing:
        raise UsageError(
            "QC-PLAN-012",
            f"{static[0].name} ({static[0].scheme}): there is no graph with static activations for {missing[0]}",
            hint=f"leave out --target {missing[0]}, or take a scheme without -{static[0].scheme.activations}",
        )


def _check_kernels(model: Model, template: Template, recipe: Recipe) -> None:
    for part in template.graphs.values():
        made = part.clone()
        if recipe.logits == "last" and model.output_head is not None:
            keep_last_position(made.graph, model.output_head)
        graph = float_graph(made, model.parameter_shapes).graph
        narrow(graph, DataType[recipe.cuda_dtype.upper()])
        cuda_kernels.check_kernels(graph)


def cuda_bytes(floats: Mapping[str, TensorInfo], layers: Mapping[str, LayerPlan], recipe: Recipe) -> int:
    """Return the bytes that the graph for CUDA adds to the sidecar, but for small constants; 0 where it is no target.

    floats: the stored tensors that are not quantized, as they are written.
    """
    if CUDA not in targets_of(recipe.targets):
        return 0
    narrow_type: torch.dtype = getattr(torch, recipe.cuda_dtype)
    total = sum(
        info.nbytes // info.dtype.itemsize * narrow_type.itemsize
        for info in floats.values()
        if info.dtype.is_floating_point and info.dtype != narrow_type
    )
    for layer in layers.values():
        if layer.form is LayerForm.CONVOLUTION:
            continue
        blocks = CUDA.blocks(layer)
        scale = layer.disk_tensors["weight_scale"]
        if scale.dtype != narrow_type or scale.shape[1] != blocks:
            total += layer.out_features * blocks * narrow_type.itemsize
        if CUDA.is_padded(layer):
            total += layer.out_features * blocks * CUDA.block_size(layer) * layer.scheme.bits // 8
    return total
