"""Export: the template lowered to a target's kernels, its initializers pointing into the written files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import onnx_ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import Tensor

from qconvert.export.context import ExportContext
from qconvert.export.cpu import lower_for_cpu
from qconvert.export.cuda import lower_for_cuda
from qconvert.export.genai import write_genai_config
from qconvert.export.lowering import MICROSOFT
from qconvert.graph.float_graph import number_repeated_names
from qconvert.graph.last_position import keep_last_position
from qconvert.ir.activation_codes import NO_CODES, GraphCodes
from qconvert.ir.artifact import CLUSTER_KEYS, LAYER_KEY
from qconvert.ir.template import DOMAIN
from qconvert.ir.write_result import WriteResult
from qconvert.job import Job
from qconvert.storage.disk import disk_errors
from qconvert.storage.stage import Stage
from qconvert.targets import graph_files, targets_of
from qconvert.targets.cpu import CPU
from qconvert.targets.cuda import CUDA
from qconvert.targets.target import Target

IR_VERSION = 10
NO_SCALES: Mapping[str, Tensor] = MappingProxyType({})
# Target -> what makes a part of the template its graph, in place.
LOWERINGS: Mapping[Target, Callable[[onnx_ir.Graph, ExportContext], None]] = {CPU: lower_for_cpu, CUDA: lower_for_cuda}


def export(
    job: Job,
    written: WriteResult,
    stage: Stage,
    codes: GraphCodes = NO_CODES,
    cache_scales: Mapping[str, Tensor] = NO_SCALES,
) -> None:
    """Write the graphs of every target, and for decoders genai_config.json, into `stage.folder`.

    codes: of the values that are quantized in static ranges. cache_scales: of the caches that are kept in codes, by the name of
        their input.

    Every tensor but small constants is external data in the files of weights or the sidecar.

    Raises ResourceError (disk), and UsageError QC-CUDA-001 to QC-CUDA-003 for what can't be a graph for CUDA.
    """
    model, template, recipe = job.model, job.template, job.recipe
    context = dataclasses.replace(ExportContext.of(job, written, stage), cache_scales=cache_scales)
    first, *_ = asked = targets_of(recipe.targets)
    for target in asked:
        for part, file in graph_files(model.task, target).items():
            graph = template.graphs[part].clone()
            if recipe.logits == "last":
                assert model.output_head is not None
                keep_last_position(graph.graph, model.output_head)
            LOWERINGS[target](graph.graph, dataclasses.replace(context, codes=codes.get(part, {})))
            stage.sidecar.sync()
            _finish(graph)
            with disk_errors(stage.folder / file):
                onnx_ir.save(graph, stage.folder / file)
            if model.task.continues_prompts and target is first:
                write_genai_config(model, graph.graph, target, stage)


def _finish(model: onnx_ir.Model) -> None:
    """Leave nothing in the file that depends on the machine: traces, paths, versions of tools."""
    RemoveUnusedNodesPass()(model)
    number_repeated_names(model.graph)
    clusters = [node for node in model.graph.all_nodes() if node.op_type != "MatMulNBits"]
    keep = {node: dict(node.metadata_props) for node in clusters if LAYER_KEY in node.metadata_props}
    ClearMetadataAndDocStringPass()(model)
    for node, properties in keep.items():
        node.metadata_props.update({key: properties[key] for key in CLUSTER_KEYS if key in properties})
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "qconvert", None
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[MICROSOFT] = 1
    model.graph.name = "qconvert"
