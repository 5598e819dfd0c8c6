"""Batch norms as parts of convolutions, before anything is quantized: integer kernels know no batch norm.

A norm that follows no convolution, but an activation function say, is a convolution by itself: of each channel alone, one pixel
wide, with the norm's factor as its weight (execution/batch_norm.py). Per channel that is quantized without loss.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from functools import cached_property

import onnx_ir
import torch
from torch import Tensor, nn

from qconvert.execution.batch_norm import Fold
from qconvert.graph.float_graph import replace, substitute
from qconvert.ir.model import Model, TensorInfo, TensorSource
from qconvert.ir.template import DOMAIN, Template, module_of
from qconvert.trace.cleanup import remove_unused
from qconvert.trace.groups import input_groups


def without_batch_norms(model: Model, template: Template) -> tuple[Model, Template]:
    """Return what `fold_batch_norms` makes of a model and its template."""
    changed, changed_template, _ = fold_batch_norms(model, template)
    return changed, changed_template


def fold_batch_norms(model: Model, template: Template) -> tuple[Model, Template, dict[str, str]]:
    """Return a model and its template in which every batch norm of images is part of the convolution before it, or is one.

    The module has an nn.Identity or an nn.Conv2d in its place, and its source gives the weights and biases that belong to that.
    What was given is left as it is. The third is, by the module of the convolution, the norm in it.
    """
    graphs = {part: graph.clone() for part, graph in template.graphs.items()}
    module = copy.deepcopy(model.module)
    folds: dict[str, Fold] = {}
    for graph in graphs.values():
        for norm in [node for node in graph.graph if node.op_type == "BatchNormalization" and node.domain == ""]:
            name = _norm_module(norm)
            taken = dict(module.named_modules()).get(name)
            if not isinstance(taken, nn.BatchNorm2d) or f"{name}.weight" not in model.source.tensors or _is_shared(model, name):
                continue
            conv = _convolution_before(norm, graph.graph, model)
            if conv is None:
                conv = _as_convolution(graph.graph, norm, name, taken)
                module.set_submodule(name, _depthwise(taken))
            else:
                replace(norm.outputs[0], conv.outputs[0])
                graph.graph.remove(norm, safe=True)
                layer = module.get_submodule(module_of(conv))
                layer.bias = _on_meta(taken.num_features)
                module.set_submodule(name, nn.Identity())
            folds[module_of(conv)] = Fold.of(name, taken)
        remove_unused(graph)
    if not folds:
        return model, template, {}
    used = {name for graph in graphs.values() for name in graph.graph.initializers}
    constants = {name: value for name, value in template.constants.items() if name in used}
    groups = input_groups([graph.graph for graph in graphs.values()], model.block_of)
    changed = dataclasses.replace(model, module=module, source=FoldedSource(model.source, folds))
    names = {convolution: fold.norm for convolution, fold in folds.items()}
    return changed, dataclasses.replace(template, graphs=graphs, groups=groups, constants=constants), names


class FoldedSource:
    """The tensors of a model whose batch norms are parts of convolutions. A TensorSource.

    folds: module of the convolution -> the norm in it; that of the norm itself where there was none.
    """

    def __init__(self, source: TensorSource, folds: Mapping[str, Fold]) -> None:
        self._source, self._folds = source, folds

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, without those of norms, with a weight and a bias for every convolution that one is part of."""
        norms = tuple(f"{fold.norm}." for fold in self._folds.values())
        tensors = {}
        for name, info in self._source.tensors.items():
            conv = name.removesuffix(".weight")
            if conv in self._folds:
                alone = self._folds[conv].norm == conv
                tensors[name] = TensorInfo(info.dtype, (*info.shape, 1, 1, 1) if alone else info.shape)
                tensors[f"{conv}.bias"] = TensorInfo(info.dtype, info.shape[:1])
            elif not name.startswith(norms):
                tensors.setdefault(name, info)
        return tensors

    def read(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype; a weight or bias with its norm in it."""
        conv, _, kind = name.rpartition(".")
        fold = self._folds.get(conv)
        if fold is None or kind not in ("weight", "bias"):
            return self._source.read(name)
        gamma, info = self._source.read(f"{fold.norm}.weight"), self.tensors[name]
        if kind == "weight":
            weight = torch.ones(info.shape) if fold.norm == conv else self._source.read(name)
            return fold.weight(weight, gamma).to(info.dtype)
        bias = self._source.read(name) if fold.norm != conv and name in self._source.tensors else None
        return fold.bias(bias, gamma, self._source.read(f"{fold.norm}.bias")).to(info.dtype)


def _convolution_before(norm: onnx_ir.Node, graph: onnx_ir.Graph, model: Model) -> onnx_ir.Node | None:
    """The convolution that gives its output to a norm alone; one that is called twice does not count."""
    x = norm.inputs[0]
    conv = None if x is None else x.producer()
    if x is None or conv is None or not _is_convolution(conv) or len(x.uses()) > 1 or x.is_graph_output():
        return None
    calls = [module_of(node) for node in graph if _is_convolution(node)]
    return conv if calls.count(module_of(conv)) == 1 and not _is_shared(model, module_of(conv)) else None


def _is_convolution(node: onnx_ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == "Conv"


def _is_shared(model: Model, module: str) -> bool:
    return any(f"{module}.{leaf}" in (*model.tied, *model.tied.values()) for leaf in ("weight", "bias"))


def _norm_module(norm: onnx_ir.Node) -> str:
    """The name of the module, of which the weight of an affine norm has the first part."""
    scale = norm.inputs[1]
    return "" if scale is None else str(scale.name).removesuffix(".weight")


def _as_convolution(graph: onnx_ir.Graph, norm: onnx_ir.Node, name: str, module: nn.BatchNorm2d) -> onnx_ir.Node:
    """Put an opaque convolution in the place of a norm."""
    attributes: dict[str, str | int | list[int]] = {
        "module": name,
        "strides": [1, 1],
        "pads": [0, 0, 0, 0],
        "dilations": [1, 1],
        "group": module.num_features,
        "kernel_shape": [1, 1],
    }
    conv = onnx_ir.node("Conv", [norm.inputs[0]], attributes, domain=DOMAIN, name=f"{name}/Conv")
    substitute(graph, norm, [conv], conv.outputs[0])
    return conv


def _depthwise(norm: nn.BatchNorm2d) -> nn.Conv2d:
    return nn.Conv2d(norm.num_features, norm.num_features, 1, groups=norm.num_features, device="meta").requires_grad_(False)


def _on_meta(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size, device="meta"), requires_grad=False)
