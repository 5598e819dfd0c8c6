"""Opaque nodes to the fastest faithful ops of ONNX Runtime's CPU provider, one function per form.

weights only      MatMulNBits on the packed bytes; accuracy level 4 (it quantizes activations inside, per block)
codebook          MatMulBnb4 on bitsandbytes' bytes; it dequantizes the whole weight whenever it runs, and computes in float32
int8 activations  dynamic per-token int8 (W8A8): every row is quantized with a scale of its own (activations.RowCodes), once
                  for all linears that read it; then MatMulIntegerToFloat on the codes, times the scale
outliers          the same on what is left when the outlier columns are masked out, plus their float product
embedding         weights only: GatherBlockQuantized on the packed bytes; a head that shares them has MatMulNBits
                  int8 activations, of a head that shares the bytes: gathered codes, cast and scaled
conv2d            the weight is dequantized when the model is loaded: small on disk, float at run time
static            codes in ranges from calibration (export/static.py); int4 weights are dequantized when the model is loaded
"""

from __future__ import annotations

import onnx_ir
from onnx_ir import DataType, Value

from qconvert.export.context import ExportContext
from qconvert.export.dequantized import dequantized
from qconvert.export.graph import GraphBuilder
from qconvert.export.lowering import MICROSOFT, Lowering
from qconvert.export.rows import Int8Weights, QuantizedRows
from qconvert.export.static import StaticLowering
from qconvert.ir import activations
from qconvert.ir.artifact import INPUT_KEY, LAYER_KEY
from qconvert.ir.layer_form import LayerForm
from qconvert.ir.number_format import FP4, NF4
from qconvert.ir.plan import LayerPlan
from qconvert.ir.template import made_by, module_of
from qconvert.targets.cpu import CPU

# MatMulBnb4's numbers for its codebooks.
BNB4_TYPES = {FP4: 0, NF4: 1}


class CpuLowering(Lowering):
    """Lowers to float32 activations, which the kernels quantize.

    decodes: whether the graph is mostly run on one token at a time.
    static: what lowers layers with static activations.
    """

    def __init__(self, builder: GraphBuilder, context: ExportContext, *, decodes: bool) -> None:
        super().__init__(builder, context)
        self.static = StaticLowering(builder, context)
        self._rows = QuantizedRows(builder, decodes=decodes)
        self._qparams: dict[str, tuple[Value, Value | None]] = {}

    def lower(self, plan: LayerPlan, node: onnx_ir.Node, bias: Value | None) -> Value:
        """Return the value that the nodes for an opaque `node` give; the nodes are in the builder."""
        x = node.inputs[0]
        assert x is not None
        module = module_of(node)
        match self.context.job.plan.form_of(module):
            case LayerForm.PACKED_STATIC if node.op_type != "Conv":
                return self._float_product(plan, x, bias)
            case LayerForm.CONVOLUTION | LayerForm.PACKED_STATIC:
                return self._conv2d(plan, node, x, bias)
            case LayerForm.PACKED_EMBEDDING:
                return self._gather_block_quantized(plan, x, CPU.block_size(plan), *self._block_qparams(plan))
            case LayerForm.INT8_EMBEDDING:
                return self._gathered_codes(plan, x)
            case LayerForm.INT8_ROWS:
                return self._row_form(plan, module, x, bias)
            case LayerForm.CODEBOOK_WEIGHTS:
                return self._matmul_bnb4(plan, self._scaled_input(plan, x), bias)
            case LayerForm.INT8_STATIC:
                return self.static.lower(plan, node, x, bias)
            case _:
                return self._matmul_nbits(plan, module, x, bias)

    def stored_float(self, name: str) -> Value:
        """Return the stored tensor `name` in float32, cast where it is narrower."""
        return self.builder.float32(self.builder.external(name))

    def _float_product(self, plan: LayerPlan, x: Value, bias: Value | None) -> Value:
        """A linear layer whose weight is dequantized when the model is loaded."""
        weight = dequantized(self.builder, plan, (plan.out_features, plan.in_features))
        transposed = self.builder.op("Transpose", [weight], f"{plan.name}/Transpose", perm=[1, 0])
        product = self.builder.op("MatMul", [x, transposed], f"{plan.name}/MatMul")
        return product if bias is None else self.builder.op("Add", [product, bias], f"{plan.name}/AddBias")

    def _matmul_nbits(self, plan: LayerPlan, module: str, unscaled: Value, bias: Value | None) -> Value:
        x = self._scaled_input(plan, unscaled)
        builder, name, bits = self.builder, plan.name, plan.scheme.bits
        size = CPU.block_size(plan)
        blocks = CPU.blocks(plan)
        packed = f"{name}.kernel_weight" if CPU.is_padded(plan) else f"{name}.weight_packed"
        weight = builder.external(packed, (plan.out_features, blocks, size * bits // 8), DataType.UINT8)
        inputs = [x, weight, *self._block_qparams(plan), None, bias]
        while inputs[-1] is None:
            inputs.pop()
        output = builder.op(
            "MatMulNBits",
            inputs,
            f"{name}/MatMulNBits",
            MICROSOFT,
            K=plan.in_features,
            N=plan.out_features,
            bits=bits,
            block_size=size,
            accuracy_level=4,
        )
        return self._named(output, module, unscaled)

    def _matmul_bnb4(self, plan: LayerPlan, x: Value, bias: Value | None) -> Value:
        builder, name, out, width = self.builder, plan.name, plan.out_features, plan.in_features
        size, bits = plan.scheme.group_size(width), plan.scheme.bits
        scale = f"{name}.kernel_scale" if plan.scheme.double_quant else f"{name}.weight.absmax"
        weight = builder.external(f"{name}.weight", (out * width * bits // 8,))
        inputs = [x, weight, builder.external(scale, (out * width // size,))]
        attributes = {"K": width, "N": out, "block_size": size, "quant_type": BNB4_TYPES[plan.scheme.format]}
        output = builder.op("MatMulBnb4", inputs, f"{name}/MatMulBnb4", MICROSOFT, **attributes)
        return output if bias is None else builder.op("Add", [output, bias], f"{name}/AddBias")

    def _block_qparams(self, plan: LayerPlan) -> tuple[Value, Value | None]:
        """Scale and zero point per block, as MatMulNBits and GatherBlockQuantized both take them; made once per tensor."""
        builder, name = self.builder, plan.name
        if name not in self._qparams:
            scale_name = f"{name}.kernel_scale" if f"{name}.kernel_scale" in builder.stored else f"{name}.weight_scale"
            zero_point = None if plan.scheme.symmetric else builder.external(f"{name}.kernel_zero_point")
            self._qparams[name] = builder.float32(builder.external(scale_name)), zero_point
        return self._qparams[name]

    def _gathered_codes(self, plan: LayerPlan, indices: Value) -> Value:
        """Rows of the signed codes [out, in], times their scales [out, 1]."""
        builder, name = self.builder, plan.name

        def gathered(suffix: str, label: str) -> Value:
            table = builder.external(f"{name}.{suffix}", view="" if suffix == "weight" else "/rows")
            rows = builder.op("Gather", [table, indices], f"{name}/Gather{label}", axis=0)
            return rows if table.dtype == DataType.FLOAT else builder.op("Cast", [rows], f"{name}/{label}", to=DataType.FLOAT)

        codes = gathered("weight", "Codes")
        if not plan.scheme.symmetric:
            codes = builder.op("Sub", [codes, gathered("weight_zero_point", "ZeroPoints")], f"{name}/Centre")
        return builder.op("Mul", [codes, gathered("weight_scale", "Scales")], f"{name}/Dequantize")

    def _row_form(self, plan: LayerPlan, module: str, unscaled: Value, bias: Value | None) -> Value:
        builder, name = self.builder, plan.name
        x = self._scaled_input(plan, unscaled)
        columns = self.outlier_columns.get(name, ())
        rows = activations.row_codes(made_by(unscaled) if x is unscaled else None)
        quantized, step = self._rows.codes(self._without(x, columns, plan), rows, plan.in_features, name)
        weight = builder.op("Transpose", [builder.external(f"{name}.weight")], f"{name}/Transpose", perm=[1, 0])
        scale = builder.float32(builder.external(f"{name}.weight_scale", (plan.out_features,)))
        zero_point = None if plan.scheme.symmetric else builder.external(f"{name}.weight_zero_point", (plan.out_features,))
        output = self._rows.product(quantized, step, rows, Int8Weights(weight, scale, zero_point), name)
        if columns:
            output = builder.op("Add", [output, self._outlier_product(x, columns, plan)], f"{name}/AddOutliers")
        if bias is not None:
            output = builder.op("Add", [output, bias], f"{name}/AddBias")
        return self._named(output, module, unscaled)

    def _named(self, output: Value, module: str, unscaled: Value) -> Value:
        """Return `output`, whose node says which module it is and what that reads.

        The verifier finds a cluster of int8 rows by these, to run it alone and to replace it; it puts in the smoothing scale
        itself. The body for prompts is made of the MatMulNBits that have them (prompt_phase.py).
        """
        producer = output.producer()
        assert producer is not None
        assert unscaled.name is not None
        producer.metadata_props[LAYER_KEY] = module
        producer.metadata_props[INPUT_KEY] = unscaled.name
        return output
