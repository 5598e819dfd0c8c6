"""A decoder in onnxruntime-genai: qconvert's artifact beside that of its model builder, both all int4."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from qconvert import Recipe, convert
from qconvert.calibrate import read_samples
from qconvert.ir.float_graph import float_graph
from qconvert.ir.progress import silent
from qconvert.ir.runtime import file_session, memory_session
from qconvert.load import load
from qconvert.trace import trace
from qconvert.verify.fidelity import measure_fidelity

PROMPT, NEW, ROUNDS = 128, 128, 7


class FedLike:
    """A session that takes the inputs of another one: the builder's does not say what shape its cache has."""

    def __init__(self, session: Any, other: Any) -> None:
        self.run, self.get_inputs = session.run, other.get_inputs


def measure(model: Any, genai: Any) -> tuple[float, float]:
    """Seconds for the prompt, and for the tokens after it."""
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=PROMPT + NEW, min_length=PROMPT + NEW, do_sample=False)
    generator = genai.Generator(model, settings)
    start = time.perf_counter()
    generator.append_tokens((np.arange(PROMPT) * 37 % 40000 + 100).astype(np.int32))
    generator.generate_next_token()
    prompt = time.perf_counter()
    while not generator.is_done():
        generator.generate_next_token()
    return prompt - start, time.perf_counter() - prompt


def test_int4_beside_the_builder(models: Path, data: Path, tmp_path: Path) -> None:
    """At least as fast in prefill and decoding, no larger, and nearer to the float model."""
    genai = pytest.importorskip("onnxruntime_genai")
    source = models / "smollm2-offgrid"
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    subprocess.run(
        [*builder, "-m", str(source), "-o", str(tmp_path / "builder"), "-c", str(tmp_path / "cache")],
        check=True,
        capture_output=True,
    )
    settings: dict[str, Any] = {
        "model": str(source),
        "quantizer": "awq",
        "scheme": "int4-g32",
        "rules": [{"pattern": "lm_head", "scheme": "int4-g32"}],
        "calibration": {"source": str(data / "calibration.txt"), "samples": 32, "length": 256},
        "evaluation": {"source": str(data / "evaluation.txt"), "samples": 24, "length": 256},
        "output": tmp_path / "qconvert",
    }
    convert(Recipe.from_settings({**settings, "verify": False}))

    loaded = {name: genai.Model(str(tmp_path / name)) for name in ("builder", "qconvert")}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loaded}
    for _ in range(ROUNDS):
        for name, model in loaded.items():
            times[name].append(measure(model, genai))
    prefill, decode = ({name: median(taken[part] for taken in times[name]) for name in loaded} for part in (0, 1))

    model = load(str(source), lambda source: None)
    baseline = memory_session(float_graph(trace(model).graph, model.parameter_shapes), model.read)
    batches = read_samples(model, Recipe.from_settings(settings), calibrated=False).evaluation
    kl, size = {}, {}
    for name in loaded:
        session = FedLike(file_session(tmp_path / name / "model.onnx"), baseline)
        found = measure_fidelity(session, baseline, batches, "causal-lm", "cpu", silent)
        kl[name] = found.kl
        size[name] = sum(path.stat().st_size for path in (tmp_path / name).iterdir() if path.is_file())
        print(
            f"\n{name:9}{PROMPT / prefill[name]:8.0f} tokens/s prefill{NEW / decode[name]:8.0f} decode"
            f"{size[name] / 1e6:8.1f} MB{kl[name]:8.4f} KL",
            end="",
        )
    print(f"\nprefill {prefill['builder'] / prefill['qconvert']:.2f} x, decode {decode['builder'] / decode['qconvert']:.2f} x")
    assert size["qconvert"] <= size["builder"]
    assert kl["qconvert"] < kl["builder"]
    assert prefill["builder"] / prefill["qconvert"] >= 1.0
    assert decode["builder"] / decode["qconvert"] >= 1.0
