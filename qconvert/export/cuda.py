"""The graph for the CUDA provider: float16 or bfloat16 throughout, every node checked against the table of kernels."""

from __future__ import annotations

import onnx_ir
import torch

from qconvert.export.context import ExportContext
from qconvert.export.graph import ONNX_TYPES, GraphBuilder
from qconvert.export.lower_cuda import CudaLowering
from qconvert.export.pack import pack_query_key_value
from qconvert.graph.cuda_kernels import check_kernels
from qconvert.graph.float_graph import lower_float, parameter, substitute
from qconvert.graph.half_precision import narrow
from qconvert.ir.model import Model
from qconvert.ir.template import DOMAIN, module_of

# Constants beyond this many bytes go into the sidecar.
INLINE_BYTES = 256

TORCH_TYPES = {onnx_type: torch_type for torch_type, onnx_type in ONNX_TYPES.items()}


def lower_for_cuda(graph: onnx_ir.Graph, context: ExportContext) -> None:
    """Make the template's `graph` one that the CUDA provider runs, in place.

    Raises UsageError QC-CUDA-001 to QC-CUDA-003 for what the provider has no kernel for, or the type of activations no number;
    ResourceError.
    """
    model, plan = context.job.model, context.job.plan
    builder = GraphBuilder(graph, context.stored)
    lowering, shapes = CudaLowering(builder, context), model.parameter_shapes
    for node in [node for node in graph if node.domain == DOMAIN]:
        layer = plan.layer_of(module_of(node))
        if layer is None:
            substitute(graph, node, *lower_float(graph, node, shapes))
            continue
        name = f"{node.attributes['module'].as_string()}.bias"
        bias = parameter(graph, name, shapes[name]) if name in shapes else None
        output = lowering.lower(layer, node, bias)
        substitute(graph, node, builder.take_nodes(), output)
    _let_norms_fuse(graph)
    narrow(graph, ONNX_TYPES[lowering.dtype])
    _bind(graph, lowering, model)
    pack_query_key_value(graph, builder)
    check_kernels(graph)


def _let_norms_fuse(graph: onnx_ir.Graph) -> None:
    """Undo what keeps the CPU provider from its slow SkipLayerNormalization (trace/cleanup.py): that on CUDA is one kernel."""
    for node in graph:
        if node.op_type == "Sum" and len(node.inputs) == 2:
            node.op_type = "Add"


def _bind(graph: onnx_ir.Graph, lowering: CudaLowering, model: Model) -> None:
    """Point parameters at their stored tensors, tied ones at one, and move large constants into the sidecar."""
    for name, value in list(graph.initializers.items()):
        content = value.const_value
        if isinstance(content, onnx_ir.LazyTensor):
            del graph.initializers[name]
            onnx_ir.convenience.replace_all_uses_with(value, lowering.stored_float(model.stored_name(name)))
        elif not isinstance(content, onnx_ir.ExternalTensor) and content is not None and content.nbytes > INLINE_BYTES:
            del graph.initializers[name]
            if value.uses():
                onnx_ir.convenience.replace_all_uses_with(value, lowering.constant(name, _tensor(content)))


def _tensor(content: onnx_ir.TensorProtocol) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(content.tobytes()), dtype=TORCH_TYPES[content.dtype])
    return flat.reshape(content.shape.numpy())
