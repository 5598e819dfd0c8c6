"""What it costs to create a session and to run it, alone in a process: session_cost.py MODEL.ONNX. One thread; prints JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

RUNS = 5


def anonymous_mb() -> float:
    """Memory of this process that no file backs."""
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous")) / 1024


def main() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    before, start = anonymous_mb(), time.process_time()
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    found = {"session cpu s": time.process_time() - start, "session MB": anonymous_mb() - before}
    found["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    names = {value.name: value.shape for value in session.get_inputs()}
    caches = {name: shape for name, shape in names.items() if name.startswith("past_key_values.")}
    # (rows, new tokens, tokens in the cache)
    for rows, length, past in ((1, 128, 0), (1, 512, 0), (1, 1, 128)) if caches else ((1, 16, 0), (1, 128, 0), (16, 128, 0)):
        ids = np.arange(rows * length).reshape(rows, length) * 7919 % 30000 + 5
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, past + length), np.int64),
            "token_type_ids": np.zeros_like(ids),
        }
        feeds = {name: value for name, value in feeds.items() if name in names}
        feeds |= {name: np.zeros((rows, shape[1], past, shape[3]), np.float32) for name, shape in caches.items()}
        times = []
        for _ in range(RUNS):
            start = time.process_time()
            session.run(None, feeds)
            times.append(time.process_time() - start)
        found[f"{rows} x {length} after {past}, cpu ms"] = 1e3 * min(times)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
