#!/usr/bin/env bash
# onnxruntime holds every intermediate of all constants that it folds, until its pass over the graph ends; an If in between frees them.
#
# Version: onnxruntime 1.31.1, CPU provider, Linux (which tells a process its peak).
# Guess: what is computed from constants alone is folded node by node as a session is created, and a value that nothing reads any
#   more is freed then. 24 chains of 36 MB each, one after the other, take some 36 MB more than none, for their results are scalars.
# Seen: they take 24 times 36 MB at once, because what a pass has replaced is taken out of the graph when the pass ends. Where each
#   quarter of the chains reads a number that comes out of an `If` on a constant, which the pass before has resolved, the peak is 0.4
#   of that, and nothing of it is left to run either. The branches have to give it in different ranks: where the shape is known
#   from the start, all is folded at once again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6

cat >look.py <<'P'
import sys

import numpy as np, onnx, onnxruntime
from onnx import TensorProto as T, helper as h, numpy_helper

CHAINS, ELEMENTS, WAVES = 24, 1 << 22, 4
CHAIN_MB = (1 + 4 + 4) * ELEMENTS / 1e6


def giving(name, value):
    kind = h.make_tensor_value_info(name, T.FLOAT, list(value.shape))
    return h.make_graph([], name, [], [kind], [numpy_helper.from_array(value, name)])


def model(way):
    one, three = (numpy_helper.from_array(np.float32(number), name) for number, name in ((1, "one"), (3, "three")))
    size = numpy_helper.from_array(np.array([ELEMENTS]), "size")
    nodes, known = [], ["one"]
    for wave in range(1, WAVES):
        other = np.float32(1).reshape(()) if way == "same ranks" else np.ones(1, np.float32)
        branches = {"then_branch": giving(f"then{wave}", np.float32(1).reshape(())), "else_branch": giving(f"else{wave}", other)}
        nodes += [
            h.make_node("ReduceSum", [known[-1]], [f"sum{wave}"], keepdims=0),
            h.make_node("Equal", [f"sum{wave}", "one"], [f"is{wave}"]),
            h.make_node("If", [f"is{wave}"], [f"known{wave}"], **branches),
        ]
        known.append(f"known{wave}")
    results = ["x"]
    for chain in range(CHAINS if way != "none" else 0):
        wave = 0 if way == "at once" else chain * WAVES // CHAINS
        value = h.make_tensor("value", T.UINT8, [1], [1 + chain])
        nodes += [
            h.make_node("Cast", [known[wave]], [f"when{chain}"], to=T.INT64),
            h.make_node("Mul", ["size", f"when{chain}"], [f"size{chain}"]),
            h.make_node("ConstantOfShape", [f"size{chain}"], [f"bytes{chain}"], value=value),
            h.make_node("Cast", [f"bytes{chain}"], [f"floats{chain}"], to=T.FLOAT),
            h.make_node("Mul", [f"floats{chain}", "three"], [f"scaled{chain}"]),
            h.make_node("ReduceMax", [f"scaled{chain}"], [f"largest{chain}"], keepdims=0),
        ]
        results.append(f"largest{chain}")
    nodes.append(h.make_node("Sum", results, ["y"]))
    ports = [h.make_tensor_value_info(name, T.FLOAT, []) for name in ("x", "y")]
    graph = h.make_graph(nodes, way.replace(" ", "_"), ports[:1], ports[1:], [one, three, size])
    made = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(made)
    return made.SerializeToString()


options = onnxruntime.SessionOptions()
options.log_severity_level = 4
session = onnxruntime.InferenceSession(model(sys.argv[1]), options, providers=["CPUExecutionProvider"])
(y,) = session.run(None, {"x": np.zeros((), np.float32)})
assert y == (0 if sys.argv[1] == "none" else 3 * sum(range(1, CHAINS + 1)))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1e3, CHAINS * CHAIN_MB)
P

cat >compare.py <<'P'
import subprocess, sys

peaks = {}
for way in ("none", "at once", "same ranks", "in waves"):
    peaks[way], whole = map(float, subprocess.check_output([sys.executable, "look.py", way], text=True).split())
    print(f"{way}: {peaks[way] - peaks['none']:.0f} MB of {whole:.0f} MB that all chains make")
more = {way: peak - peaks["none"] for way, peak in peaks.items()}
assert more["at once"] > 0.8 * whole, more
assert more["same ranks"] > 0.8 * whole, more
assert more["in waves"] < 0.5 * whole, more
P
venv/bin/python compare.py
