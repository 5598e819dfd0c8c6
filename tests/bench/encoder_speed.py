"""How fast ONNX Runtime runs an encoder's graph, alone in a process: python encoder_speed.py MODEL.ONNX.

One thread, 16 rows of 128 tokens. Prints the least seconds of a few runs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

BATCH, LENGTH, RUNS = 16, 128, 6


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main() -> None:
    run = session(Path(sys.argv[1]))
    ids = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) * 7919 % 30000 + 5
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    run.run(None, feeds)
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run.run(None, feeds)
        seconds.append(time.perf_counter() - start)
    print(min(seconds))


if __name__ == "__main__":
    main()
