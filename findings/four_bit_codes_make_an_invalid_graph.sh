#!/usr/bin/env bash
# onnxruntime makes an invalid graph of a valid one whose activations have codes of 4 bits, and then refuses to open it.
#
# Version: onnxruntime 1.31.1, CPU provider.
# Guess: QuantizeLinear and DequantizeLinear take uint4 since opset 21, and the provider has kernels for both. Where no integer kernel
#   takes 4 bits, a convolution between two such pairs is computed in float, as it is between pairs of 16 bits.
# Seen: the optimizer fuses them to QLinearConv, and drops the pairs around MaxPool, without a look at the type. The session ends with
#   INVALID_GRAPH, which blames the model: "Type 'tensor(uint4)' of input parameter (xq) of operator (QLinearConv) is invalid". The
#   same file runs with optimizations off, and with session.disable_quant_qdq. Relu and Sigmoid are left alone; 8 bits are fine.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6

cat >look.py <<'P'
import numpy as np, onnx, onnxruntime
from onnx import TensorProto as T, helper as h, numpy_helper


def network(bits, operator):
    kind = {4: T.UINT4, 8: T.UINT8}[bits]
    constants = [
        h.make_tensor("z", kind, [], [0]),
        numpy_helper.from_array(np.array(8 / (2**bits - 1), np.float32), "s"),
        numpy_helper.from_array(np.random.default_rng(0).integers(-127, 128, (8, 8, 3, 3)).astype(np.int8), "wq"),
        numpy_helper.from_array(np.full(8, 0.002, np.float32), "ws"),
        numpy_helper.from_array(np.zeros(8, np.int8), "wz"),
    ]
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2]} if operator == "MaxPool" else {}
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        h.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        h.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["w"], axis=0),
        h.make_node(operator, ["xd", "w"] if operator == "Conv" else ["xd"], ["p"], **attributes),
        h.make_node("QuantizeLinear", ["p", "s", "z"], ["pq"]),
        h.make_node("DequantizeLinear", ["pq", "s", "z"], ["y"]),
    ]
    x = h.make_tensor_value_info("x", T.FLOAT, [1, 8, 16, 16])
    y = h.make_tensor_value_info("y", T.FLOAT, ["n", "c", "h", "w"])
    model = h.make_model(h.make_graph(nodes, operator, [x], [y], constants), opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def outcome(bits, operator, way="as it is"):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if way == "optimizations off":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if way == "no QDQ fusions":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = onnxruntime.InferenceSession(network(bits, operator), options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": np.random.default_rng(1).random((1, 8, 16, 16), np.float32)})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "runs"


for operator in ("Conv", "MaxPool"):
    found = outcome(4, operator)
    print(f"{operator}, 4 bits: {found}")
    assert "INVALID_GRAPH" in found and "tensor(uint4)" in found
    for bits, way in ((8, "as it is"), (4, "optimizations off"), (4, "no QDQ fusions")):
        print(f"{operator}, {bits} bits, {way}: {outcome(bits, operator, way)}")
        assert outcome(bits, operator, way) == "runs"
for operator in ("Relu", "Sigmoid"):
    print(f"{operator}, 4 bits: {outcome(4, operator)}")
    assert outcome(4, operator) == "runs"
P
venv/bin/python look.py
