"""Export: the template lowered to a target's kernels, its initializers pointing into the written files."""

from __future__ import annotations

import onnx_ir
import torch
from onnx_ir import Value
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from qconvert.export.cuda import lower_for_cuda
from qconvert.export.genai import write_genai_config
from qconvert.export.graph import GraphBuilder
from qconvert.export.lower_cpu import CpuLowering
from qconvert.export.lower_cuda import CudaLowering
from qconvert.export.lowering import MICROSOFT
from qconvert.export.pack import pack_query_key_value, pack_shared_inputs
from qconvert.export.processors import choose_by_processor
from qconvert.graph.float_graph import lower_float, number_repeated_names, substitute
from qconvert.graph.last_position import keep_last_position
from qconvert.ir.artifact import INPUT_KEY, LAYER_KEY, TARGETS, graph_files
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.template import DOMAIN
from qconvert.ir.write_result import WriteResult
from qconvert.job import Job
from qconvert.storage.disk import disk_errors
from qconvert.storage.reader import read_tensor
from qconvert.storage.stage import Stage

IR_VERSION = 10
# Gather takes every float but these: such a table is widened when the model is loaded.
NO_GATHER = (onnx_ir.DataType.FLOAT8E4M3FN, onnx_ir.DataType.FLOAT8E5M2)


def export(job: Job, written: WriteResult, stage: Stage) -> None:
    """Write the graphs of every target, and for decoders genai_config.json, into `stage.folder`.

    Every tensor but small constants is external data in model.safetensors or the sidecar.

    Raises ResourceError (disk), and UsageError QC-CUDA-001 to QC-CUDA-003 for what can't be a graph for CUDA.
    """
    model, template, recipe = job.model, job.template, job.recipe
    stored = dict(written.tensors)
    outlier_columns = {
        name: tuple(read_tensor(stage.folder, stored[key]).tolist())
        for name in job.plan.layers
        if (key := f"{name}.outlier_columns") in stored
    }
    group_of = {name: number for number, group in enumerate(template.groups) for name in group.layers}
    asked = [target for target in TARGETS if target in recipe.targets]
    for target in asked:
        if target == "cpu":
            for name, tensor in template.constants.items():
                stored[name] = stage.sidecar.append(name, tensor)
        for part, file in graph_files(model.task, target).items():
            graph = template.graphs[part].clone()
            if recipe.logits == "last":
                assert model.output_head is not None
                keep_last_position(graph.graph, model.output_head)
            builder = GraphBuilder(graph.graph, stored)
            if target == "cpu":
                decodes = model.task.generates
                _lower_for_cpu(graph.graph, CpuLowering(builder, outlier_columns, group_of, decodes=decodes), model, job.plan)
            else:
                dtype = getattr(torch, recipe.cuda_dtype)
                lower_for_cuda(graph.graph, CudaLowering(builder, outlier_columns, group_of, stage, dtype), model, job.plan)
            stage.sidecar.sync()
            _finish(graph)
            with disk_errors(stage.folder / file):
                onnx_ir.save(graph, stage.folder / file)
            if model.task.continues_prompts and target == asked[0]:
                write_genai_config(model, graph.graph, target, stage)


def _lower_for_cpu(graph: onnx_ir.Graph, lowering: CpuLowering, model: Model, plan: Plan) -> None:
    builder, shapes = lowering.builder, model.parameter_shapes
    together: dict[tuple[int, Value | None], list[Value]] = {}  # outputs of a group's linears, by what they read
    for node in [node for node in graph if node.domain == DOMAIN]:
        name = node.attributes["module"].as_string()
        layer = plan.layer_of(name)
        if layer is not None:
            bias = builder.float32(builder.external(f"{name}.bias")) if f"{name}.bias" in shapes else None
            output = lowering.lower(layer, node, bias)
            if name in lowering.group_of:
                together.setdefault((lowering.group_of[name], node.inputs[0]), []).append(output)
            substitute(graph, node, builder.take_nodes(), output)
        else:
            substitute(graph, node, *lower_float(graph, node, shapes))
    pack_query_key_value(graph, builder)
    if model.task.continues_prompts:
        pack_shared_inputs(graph, builder, together.values())
    choose_by_processor(graph, builder)
    _bind(graph, builder, model)


def _bind(graph: onnx_ir.Graph, builder: GraphBuilder, model: Model) -> None:
    """Point the initializers that have no data yet at their stored tensors; tied ones become one."""
    for name, value in list(graph.initializers.items()):
        if name in builder.stored and not isinstance(value.const_value, onnx_ir.LazyTensor | onnx_ir.ExternalTensor):
            _rebind(graph, value, builder, name)  # a constant of the trace, now in the sidecar
        elif isinstance(value.const_value, onnx_ir.LazyTensor):
            _rebind(graph, value, builder, model.stored_name(name))


def _rebind(graph: onnx_ir.Graph, value: Value, builder: GraphBuilder, stored_name: str) -> None:
    """Let the users of `value` read the stored tensor, as float32 where it is a narrower float.

    An embedding's rows are cast after they are gathered, so that the table is never widened as a whole.
    """
    uses = list(value.uses())
    name = value.name
    assert name is not None
    was_float = value.dtype == onnx_ir.DataType.FLOAT
    del graph.initializers[name]
    target = builder.external(stored_name)
    narrow = was_float and target.dtype != onnx_ir.DataType.FLOAT
    for node, index in uses:
        if not narrow:
            node.replace_input_with(index, target)
        elif node.op_type == "Gather" and index == 0 and target.dtype not in NO_GATHER:
            node.replace_input_with(0, target)
            rows = node.outputs[0]
            readers = list(rows.uses())
            cast = builder.float32(_typed(rows, target))
            graph.insert_after(node, builder.take_nodes())
            for reader, position in readers:
                reader.replace_input_with(position, cast)
        else:
            node.replace_input_with(index, builder.widened(target))
            graph.insert_before(graph[0], builder.take_nodes())


def _typed(value: Value, like: Value) -> Value:
    value.type = like.type
    return value


def _finish(model: onnx_ir.Model) -> None:
    """Leave nothing in the file that depends on the machine: traces, paths, versions of tools."""
    RemoveUnusedNodesPass()(model)
    number_repeated_names(model.graph)
    keep = {node: dict(node.metadata_props) for node in model.graph if LAYER_KEY in node.metadata_props}
    ClearMetadataAndDocStringPass()(model)
    for node, properties in keep.items():
        node.metadata_props.update({key: properties[key] for key in (LAYER_KEY, INPUT_KEY)})
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "qconvert", None
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[MICROSOFT] = 1
    model.graph.name = "qconvert"
