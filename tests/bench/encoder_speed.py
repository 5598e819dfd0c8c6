"""How fast ONNX Runtime runs an encoder's graph, alone in a process: python encoder_speed.py MODEL.ONNX [ROWS LENGTH THREADS].

One thread and 16 rows of 128 tokens, if nothing else is said. Prints the least seconds of a few runs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

BATCH, LENGTH = 16, 128
RUNS, MANY_RUNS = 6, 60


def session(path: Path, threads: int = 1) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main() -> None:
    rows, length, threads = map(int, sys.argv[2:]) if len(sys.argv) > 2 else (BATCH, LENGTH, 1)
    run = session(Path(sys.argv[1]), threads)
    ids = np.arange(rows * length).reshape(rows, length) * 7919 % 30000 + 5
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    run.run(None, feeds)
    seconds = []
    for _ in range(RUNS if ids.size > 500 else MANY_RUNS):
        start = time.perf_counter()
        run.run(None, feeds)
        seconds.append(time.perf_counter() - start)
    print(min(seconds))


if __name__ == "__main__":
    main()
