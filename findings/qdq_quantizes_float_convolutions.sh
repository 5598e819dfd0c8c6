#!/usr/bin/env bash
# onnxruntime quantizes the float weights of a convolution, to 8 bits with one scale for all, because codes go in and come out.
#
# Version: onnxruntime 1.31.1, CPU provider.
# Guess: in a QDQ graph only what has a DequantizeLinear before it is quantized. A convolution whose weights are plain float
#   initializers (kept in float on purpose, since 8 bits are too few for it) computes in float between two pairs.
# Seen: when the session is created, its weights and bias are replaced by codes, per tensor even if channels differ a hundredfold: the
#   output is off by 30 % of its range, without a word. With a Relu behind it, they are quantized too, and the convolution is then
#   computed in float all the same: the loss without the gain. Gemm likewise; MatMul is left alone, and so is everything if the
#   optimizations are off, or if the Sum of one value stands between the convolution and QuantizeLinear.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6

cat >look.py <<'P'
import collections

import numpy as np, onnx, onnxruntime
from onnx import TensorProto as T, helper as h, numpy_helper


def run(kind, between, optimized):
    generator = np.random.default_rng(0)
    shape, size = ((16, 16, 3, 3), ["n", 16, 8, 8]) if kind == "Conv" else ((16, 16), ["n", 16])
    weight = generator.normal(0, 1, shape).astype(np.float32)
    weight[0] *= 100
    constants = {"w": weight, "s": np.array(0.02, np.float32), "z": np.array(128, np.uint8), "t": np.array(0.5, np.float32)}
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["codes"]),
        h.make_node("DequantizeLinear", ["codes", "s", "z"], ["given"]),
        h.make_node(kind, ["given", "w"], ["product"]),
        *([h.make_node(between, ["product"], ["passed"])] if between else []),
        h.make_node("QuantizeLinear", ["passed" if between else "product", "t", "z"], ["results"]),
        h.make_node("DequantizeLinear", ["results", "t", "z"], ["y"]),
    ]
    graph = h.make_graph(
        nodes,
        kind,
        [h.make_tensor_value_info("x", T.FLOAT, size)],
        [h.make_tensor_value_info("y", T.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "optimized.onnx"
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(0, 1, (2, *size[1:])).astype(np.float32)
    return session.run(None, {"x": x})[0], {node.op_type for node in onnx.load("optimized.onnx").graph.node}


def off(kind, between):
    found, operators = run(kind, between, True)
    expected, _ = run(kind, between, False)
    return float(np.abs(found - expected).max() / np.abs(expected).max()), operators


error, operators = off("Conv", None)
print(f"Conv: off by {error:.0%} of the largest, run as {sorted(operators)}")
assert error > 0.2 and "QLinearConv" in operators
error, operators = off("Conv", "Relu")
print(f"Conv, Relu: off by {error:.0%}, run as {sorted(operators)}")
assert error > 0.2 and "FusedConv" in operators
error, operators = off("Gemm", None)
print(f"Gemm: off by {error:.0%}, run as {sorted(operators)}")
assert error > 0.02 and "QGemm" in operators
for kind, between in (("Conv", "Sum"), ("Gemm", "Sum"), ("MatMul", None)):
    error, operators = off(kind, between)
    print(f"{kind}, {between}: off by {error:.0%}")
    assert error < 0.001
P
venv/bin/python look.py
