"""Every built-in quantizer on every real model: exit 0, parity passed, loads in transformers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

QUANTIZERS = ["absmax", "zero-point", "per-channel", "hqq", "awq", "llm-int8"]
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("qconvert_gguf") is None, reason="needs plugins/qconvert-gguf")
MODELS = ["minilm", pytest.param("smollm2.gguf", marks=needs_gguf)]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_runs_and_passes(model: str, quantizer: str, models: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {models / model}\noutput: {tmp_path / 'out'}\nquantizer: {quantizer}\n"
        f"calibration: {{source: {data / 'calibration.txt'}, samples: 16, length: 128}}\n"
        f"evaluation: {{source: {data / 'evaluation.txt'}, samples: 8, length: 128}}\n"
    )
    run = subprocess.run([sys.executable, "-m", "qconvert", "run", recipe, "--json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    passed = {part["target"]: part["max_relative_error"] for part in report["parity"] if part["status"] == "passed"}
    fidelity, latency = report["fidelity"][0], report["latency"][0]
    loss = f"KL {fidelity['kl']:.4f}" if "kl" in fidelity else f"cosine {fidelity['cosine']:.5f}"
    print(
        f"\n{model} {quantizer} {report['scheme']}: {loss}, {report['size']['ratio']:.2f} x the bytes, "
        f"{latency['speedup']:.2f} x the speed of float, parity {passed}"
    )
    assert set(passed) == {"cpu", "transformers"}
