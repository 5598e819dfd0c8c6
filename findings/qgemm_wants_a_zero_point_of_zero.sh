#!/usr/bin/env bash
# onnxruntime makes an integer Gemm of a QDQ graph only if the weight's DequantizeLinear spells out that its zero point is zero.
#
# Version: onnxruntime 1.31.1, CPU provider.
# Guess: the third input of DequantizeLinear is optional and 0 without it, so that leaving it out and giving zeros is the same graph.
# Seen: with zeros given, DequantizeLinear, Gemm and QuantizeLinear become QGemm. Without, Gemm stays float, and its weights are
#   dequantized at every run. Convolutions become QLinearConv either way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6

cat >look.py <<'P'
import numpy as np, onnx, onnxruntime
from onnx import TensorProto as T, helper as h, numpy_helper


def operators(kind, spelled_out):
    generator = np.random.default_rng(0)
    shape, size = ((16, 16, 3, 3), ["n", 16, 8, 8]) if kind == "Conv" else ((16, 16), ["n", 16])
    constants = {
        "w": generator.integers(-127, 128, shape).astype(np.int8),
        "v": np.full(16, 0.01, np.float32),
        "zeros": np.zeros(16, np.int8),
        "s": np.array(0.02, np.float32),
        "z": np.array(128, np.uint8),
    }
    weight = ["w", "v", "zeros"] if spelled_out else ["w", "v"]
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["codes"]),
        h.make_node("DequantizeLinear", ["codes", "s", "z"], ["given"]),
        h.make_node("DequantizeLinear", weight, ["weight"], axis=0),
        h.make_node(kind, ["given", "weight"], ["product"], **({"transB": 1} if kind == "Gemm" else {})),
        h.make_node("QuantizeLinear", ["product", "s", "z"], ["results"]),
        h.make_node("DequantizeLinear", ["results", "s", "z"], ["y"]),
    ]
    used = {name for node in nodes for name in node.input}
    graph = h.make_graph(
        nodes,
        kind,
        [h.make_tensor_value_info("x", T.FLOAT, size)],
        [h.make_tensor_value_info("y", T.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "optimized.onnx"
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load("optimized.onnx").graph.node}


for kind in ("Gemm", "Conv"):
    for spelled_out in (True, False):
        print(kind, "zeros given" if spelled_out else "left out", sorted(operators(kind, spelled_out)))
assert "QGemm" in operators("Gemm", True)
assert "Gemm" in operators("Gemm", False) and "QGemm" not in operators("Gemm", False)
assert "QLinearConv" in operators("Conv", True) and "QLinearConv" in operators("Conv", False)
P
venv/bin/python look.py
