#!/usr/bin/env bash
# onnxruntime-web does not find external data of an initializer inside a branch of If; onnxruntime does.
#
# Versions: onnxruntime 1.31.1 (Python), onnxruntime-web 1.30.0 (Node.js, wasm).
# Guess: an initializer with external data is read wherever it stands, as long as the file was given under externalData.
# Seen: the same file loads and runs in onnxruntime. onnxruntime-web loads it while the initializer stands in the main graph, and
#   raises for one in a branch: "Can't create a session. ... external data path could not be canonicalized: No such file or directory".
# So: keep external data in the main graph, and let branches read it from there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
npm install --silent --no-audit --no-fund onnxruntime-web@1.30.0 2>/dev/null

cat >make.py <<'P'
import numpy as np, onnx, onnxruntime
from onnx import TensorProto as T, helper as h

np.arange(6, dtype=np.float32).tofile("weights.bin")


def weight(name):
    tensor = onnx.TensorProto(name=name, data_type=T.FLOAT, dims=[6], data_location=T.EXTERNAL)
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", "24")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def branch(name, inside):
    node = h.make_node("Add", ["x", f"w_{name}" if inside else "w"], [f"y_{name}"])
    output = h.make_tensor_value_info(f"y_{name}", T.FLOAT, [6])
    return h.make_graph([node], name, [], [output], [weight(f"w_{name}")] if inside else [])


for place in ("main", "branch"):
    inside = place == "branch"
    node = h.make_node("If", ["c"], ["y"], then_branch=branch("then", inside), else_branch=branch("else", inside))
    inputs = [h.make_tensor_value_info("x", T.FLOAT, [6]), h.make_tensor_value_info("c", T.BOOL, [])]
    graph = h.make_graph([node], place, inputs, [h.make_tensor_value_info("y", T.FLOAT, [6])], [] if inside else [weight("w")])
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10), f"{place}.onnx")
    session = onnxruntime.InferenceSession(f"{place}.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones(6, np.float32), "c": np.array(True)})
    assert y.tolist() == [1, 2, 3, 4, 5, 6]
    print("onnxruntime", place, "runs")
P
cat >run.mjs <<'P'
import { readFileSync } from "node:fs";
import ort from "onnxruntime-web";
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "fatal";
for (const place of ["main", "branch"]) {
  const externalData = [{ path: "weights.bin", data: new Uint8Array(readFileSync("weights.bin")) }];
  try {
    const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(`${place}.onnx`)), { externalData });
    const x = new ort.Tensor("float32", new Float32Array(6).fill(1), [6]);
    const { y } = await session.run({ x, c: new ort.Tensor("bool", [true], []) });
    console.log("onnxruntime-web", place, Array.from(y.data).join() === "1,2,3,4,5,6" ? "runs" : "is wrong");
  } catch (error) {
    console.log("onnxruntime-web", place, String(error).includes("could not be canonicalized") ? "is not found" : error);
  }
}
P
{ venv/bin/python make.py && node run.mjs 2>/dev/null; } | tee seen.txt
diff seen.txt - <<'P'
onnxruntime main runs
onnxruntime branch runs
onnxruntime-web main runs
onnxruntime-web branch is not found
P
