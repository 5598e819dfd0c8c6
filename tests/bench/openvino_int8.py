"""OpenVINO's int8 of an encoder, by nncf: weights and activations. Run by an interpreter that has openvino and nncf.

    python openvino_int8.py make PLAIN.ONNX SAMPLES.NPZ OUT.XML      calibrates and quantizes a transformer
    python openvino_int8.py outputs OUT.XML SAMPLES.NPZ STATES.NPZ   writes the first output for each batch
    python openvino_int8.py time OUT.XML ROWS LENGTH THREADS         prints the least seconds of a few runs

SAMPLES holds "0.input_ids", "0.attention_mask" ... for each batch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino

RUNS, MANY_RUNS = 6, 60


def batches(path: str) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    with np.load(path) as stored:
        for key in stored.files:
            number, _, name = key.partition(".")
            found.setdefault(int(number), {})[name] = stored[key]
    return list(found.values())


def make(plain: str, samples: str, out: str) -> None:
    import nncf  # takes seconds

    calibration = batches(samples)
    quantized = nncf.quantize(
        openvino.Core().read_model(plain),
        nncf.Dataset(calibration),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(calibration),
    )
    openvino.save_model(quantized, out)


def outputs(model: str, samples: str, states: str) -> None:
    run = compiled(model, 1)
    np.savez(states, *[run.infer(batch)[0] for batch in batches(samples)])


def seconds(model: str, rows: str, length: str, threads: str) -> None:
    run, count = compiled(model, int(threads)), int(rows) * int(length)
    ids = np.arange(count).reshape(int(rows), int(length)) * 7919 % 30000 + 5
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    run.infer(feeds)
    taken = []
    for _ in range(RUNS if count > 500 else MANY_RUNS):
        start = time.perf_counter()
        run.infer(feeds)
        taken.append(time.perf_counter() - start)
    print(min(taken))


def compiled(model: str, threads: int) -> Any:
    # Without this, what is left in float would be bfloat16 on processors with AMX.
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()


COMMANDS: dict[str, Callable[..., None]] = {"make": make, "outputs": outputs, "time": seconds}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
