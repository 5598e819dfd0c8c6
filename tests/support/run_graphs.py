"""Runs graphs with ONNX Runtime and numpy alone, so that an emulated processor can: run_graphs.py FOLDER RESULTS.npz.

FOLDER/NAME.npz holds the inputs of the graph whose path FOLDER/NAME.path holds. Results: "NAME" -> the graph's first output.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main() -> None:
    folder, results = Path(sys.argv[1]), {}
    for inputs in sorted(folder.glob("*.npz")):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        path = inputs.with_suffix(".path").read_text(encoding="utf-8")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        with np.load(inputs) as feeds:
            results[inputs.stem] = session.run(None, dict(feeds))[0]
    np.savez(sys.argv[2], **results)


if __name__ == "__main__":
    main()
