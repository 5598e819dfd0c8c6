#!/usr/bin/env bash
# onnxruntime folds the constants of both branches of an If whose condition is itself a constant, and keeps one of them.
#
# Version: onnxruntime 1.31.1, CPU provider.
# Guess: a condition that is known when the session is created costs nothing; the branch that is not taken is dropped unseen.
# Seen: nodes in the branch that is not taken are computed first. Transpose(Neg(weight)) there takes two more copies of a weight of
#   128 MB at the peak. Where the output of Neg has no known shape yet (its other factor comes from another If, whose branches give
#   values of different ranks) it is left alone, and nothing is taken.
# So: what is expensive and perhaps not needed must hang on a value without a known shape.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6

cat >make.py <<'P'
import numpy as np, onnx
from onnx import TensorProto as T, helper as h, numpy_helper

ROWS, COLUMNS = 8192, 4096  # 128 MB
np.zeros((ROWS, COLUMNS), np.float32).tofile("weights.bin")
weight = onnx.TensorProto(name="w", data_type=T.FLOAT, dims=[ROWS, COLUMNS], data_location=T.EXTERNAL)
weight.external_data.add(key="location", value="weights.bin")


def branch(name, nodes, constants=()):
    return h.make_graph(nodes, name, [], [h.make_tensor_value_info(nodes[-1].output[0], T.FLOAT, None)], list(constants))


def product(name, factor):
    nodes = [h.make_node("Mul", ["w", factor], [f"m_{name}"])] if factor else []
    transpose = h.make_node("Transpose", [f"m_{name}" if factor else "w"], [f"t_{name}"], perm=[1, 0])
    return branch(name, [*nodes, transpose, h.make_node("MatMul", ["x", f"t_{name}"], [f"y_{name}"])])


def either(name, then, otherwise):
    return h.make_node("If", ["true"], [name], then_branch=then, else_branch=otherwise)


def save(name, factor, *before):
    constants = [weight, numpy_helper.from_array(np.array(True), "true"), numpy_helper.from_array(np.array(-1, np.float32), "minus")]
    taken, left = product("taken", None), product("left", factor) if factor else branch("left", [h.make_node("Identity", ["x"], ["i"])])
    graph = h.make_graph(
        [*before, either("y", taken, left)],
        name,
        [h.make_tensor_value_info("x", T.FLOAT, [1, COLUMNS])],
        [h.make_tensor_value_info("y", T.FLOAT, None)],
        constants,
    )
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10), f"{name}.onnx")


def given(name, value):
    value = numpy_helper.from_array(np.array(value, np.float32), f"{name}_value")
    output = h.make_tensor_value_info(value.name, T.FLOAT, value.dims)
    return h.make_graph([], name, [], [output], [value])


save("nothing", None)
save("shape_known", "minus")
save("shape_unknown", "factor", either("factor", given("none", []), given("minus_one", -1)))
P
cat >load.py <<'P'
import resource, sys
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
P
venv/bin/python make.py
for name in nothing shape_known shape_unknown; do declare "$name=$(venv/bin/python load.py $name.onnx)"; done
# shellcheck disable=SC2154
echo "more MB at the peak, for the branch that is not taken: $((shape_known - nothing)), without a known shape $((shape_unknown - nothing))"
((shape_known - nothing > 200 && shape_unknown - nothing < 60))
