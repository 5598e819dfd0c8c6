#!/usr/bin/env bash
# GroupQueryAttention of onnxruntime looks at how many scales an int8 cache has, and not at their shape.
#
# Version: onnxruntime 1.31.1, CPU provider.
# Guess: k_scale and v_scale have to broadcast to the cache, as the schema says, so with PER_CHANNEL they are
#   [1, heads, 1, head size]. Of another shape, such as [1, head size, 1, heads], they do not broadcast, and are refused.
# Seen: as many numbers are taken in any shape, and read in the order of memory: what was laid out as [1, head size, 1, heads] gives
#   other attentions without a word. Only another count is refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6

cat >look.py <<'P'
import numpy as np, onnxruntime
from onnx import TensorProto as T, helper as h, numpy_helper

HEADS, SIZE, TOKENS = 2, 16, 5
rng = np.random.default_rng(0)
scales = rng.random((1, HEADS, 1, SIZE), np.float32) * 0.05 + 0.01
query, key, value = (rng.standard_normal((1, TOKENS, HEADS * SIZE), np.float32) for _ in range(3))


def attended(scale):
    inputs = ["query", "key", "value", "past_k", "past_v", "last", "total", "", "", "", "", "", "scale", "scale"]
    node = h.make_node(
        "GroupQueryAttention",
        inputs,
        ["y", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=HEADS,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=8,
    )
    row = [h.make_tensor_value_info(name, T.FLOAT, [1, TOKENS, HEADS * SIZE]) for name in ("query", "key", "value", "y")]
    past = [h.make_tensor_value_info(f"past_{part}", T.INT8, [1, HEADS, "past", SIZE]) for part in "kv"]
    present = [h.make_tensor_value_info(f"present_{part}", T.INT8, [1, HEADS, "total", SIZE]) for part in "kv"]
    constants = [
        numpy_helper.from_array(scale, "scale"),
        numpy_helper.from_array(np.array([TOKENS - 1], np.int32), "last"),
        numpy_helper.from_array(np.array(TOKENS, np.int32), "total"),
    ]
    graph = h.make_graph([node], "attention", [*row[:3], *past], [row[3], *present], constants)
    domains = [h.make_opsetid("", 21), h.make_opsetid("com.microsoft", 1)]
    model = h.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    empty = np.zeros((1, HEADS, 0, SIZE), np.int8)
    feeds = {"query": query, "key": key, "value": value, "past_k": empty, "past_v": empty}
    return session.run(["y", "present_k"], feeds)


y, codes = attended(scales)
laid_out = key.reshape(1, TOKENS, HEADS, SIZE).transpose(0, 2, 1, 3)
assert np.array_equal(codes, np.clip(np.rint(laid_out / scales), -128, 127))
print("the documented shape: the codes are those of numpy")
for shape in ((HEADS * SIZE,), (1, SIZE, 1, HEADS), (SIZE, HEADS)):
    same = attended(scales.reshape(shape))
    print(f"the same numbers as {list(shape)}: the same result {np.array_equal(same[0], y)}")
    assert np.array_equal(same[0], y)
turned = attended(np.ascontiguousarray(scales.transpose(0, 3, 2, 1)))
print(f"transposed, as {[1, SIZE, 1, HEADS]}: taken, and off by {np.abs(turned[0] - y).max():.3f}")
assert not np.allclose(turned[0], y, atol=1e-3)
try:
    attended(scales[:, :1])
except Exception as error:
    print(f"half as many: {type(error).__name__}")
else:
    raise SystemExit("half as many are taken")
P
venv/bin/python look.py
