"""Opaque nodes to the ops of ONNX Runtime's CUDA provider: MatMulNBits with float16 or bfloat16 activations for every scheme.

weights only      MatMulNBits on the packed bytes, symmetric, in blocks of 32 (groups of 16: of 16)
int8 activations  the same on the signed bytes with their highest bit flipped, which makes them the unsigned ones that the
                  kernel takes; that is done once, when the model is loaded. Activations stay float
outliers          the same on what is left when the outlier columns are masked out, plus their float product
embedding         GatherBlockQuantized on the packed bytes; signed bytes are gathered, cast and scaled
conv2d            the weight is dequantized when the model is loaded: small on disk, float at run time

The kernels take no bias (their fast forms refuse it), so it is added. What the shared file does not hold in the form that
they need goes into the sidecar: scales per block, padded copies, float tensors in another type.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
import torch
from onnx_ir import DataType, TensorType, Value
from torch import Tensor

from qconvert.errors import UsageError
from qconvert.export.context import ExportContext
from qconvert.export.graph import ONNX_TYPES, GraphBuilder
from qconvert.export.lowering import MICROSOFT, Lowering
from qconvert.graph.half_precision import WIDER, out_of_range
from qconvert.ir.finite import all_finite
from qconvert.ir.layer_form import LayerForm
from qconvert.ir.plan import LayerPlan
from qconvert.ir.template import module_of
from qconvert.storage.reader import read_layer, read_tensor
from qconvert.targets.cuda import CUDA

# A scale with fewer bits than this adds more to the error than rounding to 8-bit codes does.
SCALE_BITS = 7


class CudaLowering(Lowering):
    """Lowers to activations of the recipe's type, and writes what that needs into the sidecar.

    Raises UsageError QC-CUDA-002 for a tensor, QC-CUDA-003 for scales beyond the range of `dtype`, ResourceError (disk).
    """

    def __init__(self, builder: GraphBuilder, context: ExportContext) -> None:
        super().__init__(builder, context)
        self.stage = context.stage
        self.dtype: torch.dtype = getattr(torch, context.job.recipe.cuda_dtype)

    def lower(self, plan: LayerPlan, node: onnx_ir.Node, bias: Value | None) -> Value:
        """Return the value that the nodes for an opaque `node` give; the nodes are in the builder.

        Raises UsageError QC-CUDA-002.
        """
        x = node.inputs[0]
        assert x is not None
        form = self.context.job.plan.form_of(module_of(node))
        if form is LayerForm.CONVOLUTION:
            self._narrowed_scale(plan, read_tensor(self.stage.folder, self.builder.stored[f"{plan.name}.weight_scale"]))
            return self._conv2d(plan, node, x, bias)
        if form is LayerForm.INT8_EMBEDDING:
            return self._gathered_codes(plan, x)
        if form is LayerForm.PACKED_EMBEDDING:
            return self._gather_block_quantized(plan, x, CUDA.block_size(plan), self._scale(plan))
        columns = self.outlier_columns.get(plan.name, ())
        x = self._scaled_input(plan, x)
        output = self._matmul_nbits(plan, self._without(x, columns, plan))
        if columns:
            output = self.builder.op("Add", [output, self._outlier_product(x, columns, plan)], f"{plan.name}/AddOutliers")
        return output if bias is None else self.builder.op("Add", [output, bias], f"{plan.name}/AddBias")

    def stored_float(self, name: str) -> Value:
        """Return the stored tensor itself where it has the graph's float type; small integers are cast, other floats have a
        copy.
        """
        stored = self.builder.stored[name]
        if stored.dtype == self.dtype:
            return self.builder.external(name)
        if not stored.dtype.is_floating_point:
            return self.builder.op("Cast", [self.builder.external(name)], f"{name}/Cast", to=ONNX_TYPES[self.dtype])
        narrow = f"{name}.{type_name(self.dtype)}"
        if narrow not in self.builder.stored:
            self._append(narrow, narrowed(name, read_tensor(self.stage.folder, stored), self.dtype))
        return self.builder.external(narrow)

    def _matmul_nbits(self, plan: LayerPlan, x: Value) -> Value:
        return self.builder.op(
            "MatMulNBits",
            [x, self._weight(plan), self._scale(plan)],
            f"{plan.name}/MatMulNBits",
            MICROSOFT,
            K=plan.in_features,
            N=plan.out_features,
            bits=plan.scheme.bits,
            block_size=CUDA.block_size(plan),
        )

    def _weight(self, plan: LayerPlan) -> Value:
        """Unsigned codes [out, blocks, block bytes] uint8."""
        builder, size, bits = self.builder, CUDA.block_size(plan), plan.scheme.bits
        shape = (plan.out_features, -(-plan.in_features // size), size * bits // 8)
        if CUDA.is_padded(plan):
            name = f"{plan.name}.cuda_weight"
            if name not in builder.stored:
                q = read_layer(self.stage.folder, plan, builder.stored).q
                padded = torch.nn.functional.pad(q, (0, -plan.in_features % size))
                self._append(name, plan.scheme.format.pack(padded).reshape(shape))
            return builder.external(name)
        if plan.form.is_packed:
            return builder.external(f"{plan.name}.weight_packed", shape, DataType.UINT8)
        signed = builder.external(f"{plan.name}.weight", shape, DataType.UINT8, view="/bytes")
        highest_bit = builder.constant("qconvert/highest_bit", np.array(128, np.uint8))
        unsigned = builder.op("BitwiseXor", [signed, highest_bit], f"{plan.name}/Unsigned")
        unsigned.type, unsigned.shape = TensorType(DataType.UINT8), onnx_ir.Shape(shape)
        return unsigned

    def _scale(self, plan: LayerPlan) -> Value:
        """Scales [out, blocks] in the type of the activations, as MatMulNBits and GatherBlockQuantized both take them."""
        builder, name = self.builder, f"{plan.name}.cuda_scale"
        if name in builder.stored:
            return builder.external(name)
        stored = builder.stored[f"{plan.name}.weight_scale"]
        scale = read_tensor(self.stage.folder, stored)
        narrow = self._narrowed_scale(plan, scale)
        blocks = CUDA.blocks(plan)
        if stored.dtype == self.dtype and scale.shape[1] == blocks:
            return builder.external(f"{plan.name}.weight_scale")
        self._append(name, narrow.repeat_interleave(blocks // scale.shape[1], 1))
        return builder.external(name)

    def _gathered_codes(self, plan: LayerPlan, indices: Value) -> Value:
        builder, name = self.builder, plan.name
        rows = builder.op("Gather", [builder.external(f"{name}.weight"), indices], f"{name}/GatherCodes", axis=0)
        codes = builder.op("Cast", [rows], f"{name}/Codes", to=ONNX_TYPES[self.dtype])
        scales = builder.op("Gather", [self.stored_float(f"{name}.weight_scale"), indices], f"{name}/GatherScales", axis=0)
        return builder.op("Mul", [codes, scales], f"{name}/Dequantize")

    def constant(self, name: str, tensor: Tensor) -> Value:
        """Return a constant of the graph, kept in the sidecar."""
        if name not in self.builder.stored:
            self._append(name, tensor)
        return self.builder.external(name)

    def _append(self, name: str, tensor: Tensor) -> None:
        self.builder.stored[name] = self.stage.sidecar.append(name, tensor)

    def _narrowed_scale(self, plan: LayerPlan, scale: Tensor) -> Tensor:
        """Scales that neither overflow, the weights that they stand for included, nor lose most of their bits."""
        info = torch.finfo(self.dtype)
        largest = float(scale.abs().max())
        smallest = info.smallest_normal * info.eps * 2**SCALE_BITS
        if largest * 2 ** (plan.scheme.bits - 1) > info.max or largest < smallest:
            raise UsageError(
                "QC-CUDA-003",
                f"{plan.name}: its largest scale is {largest:.3g}, which {type_name(self.dtype)} can't hold (scales of "
                f"{plan.scheme} have to lie between {smallest:.3g} and {info.max / 2 ** (plan.scheme.bits - 1):.3g})",
                hint=f"{WIDER}, or keep the layer in float: --rule '{plan.name}=float'",
            )
        return scale.to(self.dtype)


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor` as `dtype`. Raises UsageError QC-CUDA-002 for a number that becomes infinite."""
    narrow_tensor = tensor.to(dtype)
    if not all_finite(narrow_tensor):
        largest = max(map(abs, torch.stack(tensor.float().aminmax()).tolist()))
        raise out_of_range(name, largest, type_name(dtype), torch.finfo(dtype).max)
    return narrow_tensor


def type_name(dtype: torch.dtype) -> str:
    """Return the type's name as users write it: "float16"."""
    return str(dtype).removeprefix("torch.")
