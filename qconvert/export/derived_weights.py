"""int8 weights for the body that runs prompts, derived from packed codes when a session is created: nothing more on disk.

    w [out, in] = round((code - zero point) * scale of the group / step of the row)        step = largest of the row / levels

The elementwise product is a convolution of 8-bit codes, one channel for each group of each row: QLinearConv takes a scale for
every channel and a bias in int32, which is minus the zero point, and gives a byte for a byte. All of it depends on constants
alone, so ONNX Runtime folds it when it creates the session, and one int8 initializer [in, out] is left.

What is folded in one pass over the graph is held until that pass ends: 4 bytes per weight here. So the weights come in WAVES,
each of which waits for an `If` that the pass before has resolved; ONNX Runtime makes 10 passes at most
(max_num_graph_transformation_steps). On SmolLM2, creating a session then peaks at 3.0 bytes per weight in place of 4.7.

Signed weights saturate on AVX2 without VNNI (graph/integer_products.py), if they use their range: pairs of products are added
up in 16 bits there. Half the range is exact everywhere, 2 * 255 * 63 being less than 2^15, so that is what they get there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir import DataType, Node, TensorType, Value

from qconvert.export.graph import GraphBuilder
from qconvert.export.processors import signed_products_are_exact
from qconvert.export.rows import Int8Weights
from qconvert.graph.values import constant, giving
from qconvert.ir.prompt_weights import LEAST_STEP, LEVELS, LEVELS_WITHOUT_VNNI, PROMPT_BITS

WAVES = 6
NAME = "qconvert/prompt_weights"


def can_derive(node: Node) -> bool:
    """Return whether there is a form for the weights of a MatMulNBits: packed in 4 or 8 bits, in one stretch of a file."""
    weight = node.inputs[1]
    return (
        node.attributes["bits"].as_int() in PROMPT_BITS
        and weight is not None
        and isinstance(weight.const_value, onnx_ir.ExternalTensor)
    )


def derived_weights(nodes: Sequence[Node], builder: GraphBuilder) -> dict[Node, Int8Weights]:
    """Add what derives the weights of every MatMulNBits of `nodes`, all of which `can_derive`.

    The largest come in the first wave, when nothing else is held, and last in that: what is freed then is given back.
    """
    if not nodes:
        return {}
    by_size = sorted(nodes, key=_weights, reverse=True)
    total, before = sum(map(_weights, nodes)), 0
    waves: dict[Node, int] = {}
    for node in by_size:
        waves[node] = WAVES * before // total
        before += _weights(node)
    chains = _Chains(builder)
    return {node: chains.derived(node, waves[node]) for node in sorted(nodes, key=_weights)}


def _weights(node: Node) -> int:
    return node.attributes["K"].as_int() * node.attributes["N"].as_int()


class _Chains:
    """Adds the nodes that derive one weight after the other."""

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder = builder
        self.one = self._constant("one", np.float32(1))
        self.flat = self._integers("flat", -1)
        self.rows = self._integers("rows", 1)
        exact = signed_products_are_exact(builder)
        levels = [self._constant(f"levels_{count}", np.float32(count)) for count in (LEVELS, LEVELS_WITHOUT_VNNI)]
        self.levels = builder.op("Where", [exact, *levels], f"{NAME}/levels")
        self.waves = self._waves()

    def derived(self, node: Node, wave: int) -> Int8Weights:
        """Add the nodes for one MatMulNBits."""
        name = str(node.name)
        width, out, bits, size = (node.attributes[key].as_int() for key in ("K", "N", "bits", "block_size"))
        blocks = -(-width // size)
        _, packed, scales, *rest = node.inputs
        assert packed is not None
        assert scales is not None
        codes, offset = self._codes(packed, (1, out * blocks, size), bits, name)
        points = self._zero_points(rest[0], (out, blocks), bits, name) if rest and rest[0] is not None else None
        scale = self._op("Reshape", [scales, self._integers(f"blocks_{out}_{blocks}", out, blocks)], name, "Scales")
        step = self._steps(scale, points, bits, name)
        ratio = self._op("Reshape", [self._op("Div", [scale, step], name, "Ratios"), self.flat], name, "FlatRatios")
        channels = self._integers(f"channels_{out * blocks}", out * blocks, 1, 1)
        ones = self._op("ConstantOfShape", [channels], name, "Ones", value=onnx_ir.tensor(np.array([1], np.int8)))
        none = self._constant("zero", np.int8(0))
        zero = none if points is not None else self._constant(f"zero_{bits}", np.int8(2 ** (bits - 1) - offset))
        # x, its scale and zero point, w, its scales and zero point, scale and zero point of the result, bias
        inputs = [codes, self.one, zero, ones, ratio, none, self.waves[wave], none]
        if points is not None:
            minus = self._op("Sub", [self._float(offset), points], name, "MinusZeroPoints")
            flat = self._op("Reshape", [minus, self.flat], name, "Bias")
            inputs.append(self._op("Cast", [flat], name, "BiasCodes", to=DataType.INT32))
        weight = self._op("QLinearConv", inputs, name, "Codes", group=out * blocks, kernel_shape=[1])
        shape = self._integers(f"weight_{out}_{blocks * size}", out, blocks * size)
        weight = self._op("Reshape", [weight, shape], name, "Weight")
        if blocks * size > width:
            ends = [self._integers(f"slice_{end}", end) for end in (0, width)]
            weight = self._op("Slice", [weight, *ends, self.rows], name, "Unpadded")
        transposed = self._op("Transpose", [weight], name, "Transposed", perm=[1, 0])
        return Int8Weights(transposed, self._op("Reshape", [step, self.flat], name, "Steps"))

    def _steps(self, scale: Value, points: Value | None, bits: int, name: str) -> Value:
        """The step of each row of int8 weights [out, 1]: the largest weight that codes can stand for, by the levels.

        scale, points: scales and zero points [out, blocks].
        """
        farthest = self._float(2 ** (bits - 1))
        if points is not None:
            above = self._op("Sub", [self._float(2**bits - 1), points], name, "Above")
            farthest = self._op("Max", [points, above], name, "Farthest")
        largest = self._op("Mul", [self._op("Abs", [scale], name, "Magnitudes"), farthest], name, "Reach")
        largest = self._op("ReduceMax", [largest, self.rows], name, "Largest", keepdims=1)
        step = self._op("Div", [largest, self.levels], name, "Step")
        return self._op("Max", [step, self._float(LEAST_STEP)], name, "LeastStep")

    def _codes(self, packed: Value, shape: tuple[int, int, int], bits: int, name: str) -> tuple[Value, int]:
        """(codes as int8 in `shape`, what was taken off them)."""
        if bits == 4:
            view = self.builder.view(packed, DataType.UINT4, f"{packed.name}/codes", shape)
            return self._op("Cast", [view], name, "Unpacked", to=DataType.INT8), 0
        view = self.builder.view(packed, DataType.INT8, f"{packed.name}/codes", shape)
        # The unsigned byte less 128, read as a signed one, has the other highest bit.
        return self._op("BitwiseXor", [view, self._constant("highest_bit", np.int8(-128))], name, "Signed"), 128

    def _zero_points(self, packed: Value, shape: tuple[int, int], bits: int, name: str) -> Value:
        """The zero points in float32 [out, blocks], of those packed along the blocks."""
        out, blocks = shape
        points = packed
        if bits == 4:
            low = self._op("BitwiseAnd", [packed, self._constant("low_bits", np.uint8(15))], name, "LowZeroPoints")
            four = self._constant("four", np.uint8(4))
            high = self._op("BitShift", [packed, four], name, "HighZeroPoints", direction="RIGHT")
            packed_shape = self._integers(f"pairs_{out}_{(blocks + 1) // 2}", out, (blocks + 1) // 2, 1)
            halves = [self._op("Reshape", [half, packed_shape], name, "Half") for half in (low, high)]
            points = self._op("Concat", halves, name, "Pairs", axis=-1)
        shape_of_all = self._integers(f"points_{out}_{blocks}", out, blocks + blocks % 2 if bits == 4 else blocks)
        points = self._op("Reshape", [points, shape_of_all], name, "ZeroPoints")
        if bits == 4 and blocks % 2:
            ends = [self._integers(f"slice_{end}", end) for end in (0, blocks)]
            points = self._op("Slice", [points, *ends, self.rows], name, "WithoutPadding")
        return self._op("Cast", [points], name, "FloatZeroPoints", to=DataType.FLOAT)

    def _waves(self) -> list[Value]:
        """1, for each wave: known once so many waves were folded."""
        waves = [self.one]
        for index in range(1, WAVES):
            known = self.builder.op("ReduceSum", [waves[-1]], f"{NAME}/known_{index}", keepdims=0)
            known = self.builder.op("Equal", [known, self.one], f"{NAME}/is_known_{index}")
            # Branches of different ranks: what reads the value has no shape, and is not folded, until one was chosen.
            ones = {"then": np.ones((), np.float32), "else": np.ones(1, np.float32)}
            names = {branch: f"{NAME}/wave_{index}/{branch}" for branch in ones}
            branches = {f"{each}_branch": giving(constant(names[each], ones[each]), f"{names[each]}/branch") for each in ones}
            node = onnx_ir.node("If", [known], branches, name=f"{NAME}/wave_{index}")
            node.outputs[0].type = TensorType(DataType.FLOAT)
            self.builder.nodes.append(node)
            waves.append(node.outputs[0])
        return waves

    def _op(self, op_type: str, inputs: Sequence[Value | None], name: str, label: str, **attributes: Any) -> Value:
        return self.builder.op(op_type, inputs, f"{name}/{label}", **attributes)

    def _float(self, number: float) -> Value:
        return self._constant(f"float_{number}", np.float32(number))

    def _integers(self, label: str, *numbers: int) -> Value:
        return self._constant(label, np.array(numbers, np.int64))

    def _constant(self, label: str, value: Any) -> Value:
        return self.builder.constant(f"{NAME}/{label}", np.asarray(value))
