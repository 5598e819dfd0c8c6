"""The graph for the CPU provider: float32 activations, every initializer in the stored type and cast where it is read."""

from __future__ import annotations

import onnx_ir
from onnx_ir import Value

from qconvert.export.context import ExportContext
from qconvert.export.graph import GraphBuilder
from qconvert.export.lower_cpu import CpuLowering
from qconvert.export.pack import pack_query_key_value, pack_shared_inputs
from qconvert.export.processors import choose_by_processor
from qconvert.export.prompt_phase import add_prompt_phase
from qconvert.export.static import insert_pairs, keep_float_products
from qconvert.graph.cache_codes import write_cache_codes
from qconvert.graph.float_graph import lower_float, substitute
from qconvert.ir.model import Model
from qconvert.ir.template import DOMAIN, module_of

# Gather takes every float but these: such a table is widened when the model is loaded.
NO_GATHER = (onnx_ir.DataType.FLOAT8E4M3FN, onnx_ir.DataType.FLOAT8E5M2)


def lower_for_cpu(graph: onnx_ir.Graph, context: ExportContext) -> None:
    """Make the template's `graph` one that the CPU provider runs, in place. Raises ResourceError (disk)."""
    model, plan, stage = context.job.model, context.job.plan, context.stage
    scales = {f"{cache}.scale": scale for cache, scale in context.cache_scales.items()}
    for name, tensor in {**context.job.template.constants, **scales}.items():
        if name not in stage.sidecar.tensors:
            context.stored[name] = stage.sidecar.append(name, tensor)
    builder = GraphBuilder(graph, context.stored)
    insert_pairs(graph, builder, context)
    lowering, shapes = CpuLowering(builder, context, decodes=model.task.generates), model.parameter_shapes
    together: dict[tuple[int, Value | None], list[Value]] = {}  # outputs of a group's linears, by what they read
    for node in [node for node in graph if node.domain == DOMAIN]:
        name = module_of(node)
        layer = plan.layer_of(name)
        if layer is not None:
            bias = builder.float32(builder.external(f"{name}.bias")) if f"{name}.bias" in shapes else None
            output = lowering.lower(layer, node, bias)
            if name in context.group_of:
                together.setdefault((context.group_of[name], node.inputs[0]), []).append(output)
            substitute(graph, node, builder.take_nodes(), output)
        else:
            substitute(graph, node, *lower_float(graph, node, shapes))
    pack_query_key_value(graph, builder)
    if model.task.continues_prompts:
        pack_shared_inputs(graph, builder, together.values())
    keep_float_products(graph)
    choose_by_processor(graph, builder, lowering.static.weights)
    if scales:
        write_cache_codes(graph, lambda cache: builder.external(f"{cache}.scale"))
    _bind(graph, builder, model)
    if plan.prefill == "int8":
        add_prompt_phase(graph, builder, model.output_head)


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
