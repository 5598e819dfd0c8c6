"""What the quantizers lose on a decoder whose weights lie on no grid, and how long they take, beside llm-compressor's AWQ.

The peer wants an environment of its own: --bench-peer PYTHON, the interpreter of one with llmcompressor.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qconvert.calibrate import read_samples
from qconvert.load import load
from qconvert.recipe import Recipe

from . import process


@dataclass(frozen=True)
class Loss:
    """kl: mean over all positions of 24 x 256 tokens; seconds: to calibrate and quantize on 32 x 256, the model loaded."""

    kl: float
    seconds: float


@pytest.fixture(scope="module")
def settings(models: Path, data: Path) -> dict[str, Any]:
    return {
        "model": str(models / "smollm2-offgrid"),
        "calibration": {"source": str(data / "calibration.txt"), "samples": 32, "length": 256},
        "evaluation": {"source": str(data / "evaluation.txt"), "samples": 24, "length": 256},
    }


@pytest.fixture(scope="module")
def peer(request: pytest.FixtureRequest, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Loss:
    """llm-compressor's AWQ, int4 in groups of 32, asymmetric, the head in float, on the same tokens."""
    python = request.config.getoption("--bench-peer")
    if python is None:
        pytest.skip("needs --bench-peer PYTHON")
    recipe = Recipe.from_settings({**settings, "output": "unused"})
    samples = read_samples(load(recipe.model, lambda source: None), recipe, calibrated=True)
    windows = tmp_path_factory.mktemp("peer") / "windows.npz"
    parts = {"calibration": samples.calibration, "evaluation": samples.evaluation}
    np.savez(windows, **{name: np.concatenate([batch["input_ids"] for batch in found]) for name, found in parts.items()})  # type: ignore[arg-type]
    script = Path(__file__).with_name("peer_awq.py")
    run = subprocess.run([python, script, recipe.model, windows, "asym"], check=True, capture_output=True, text=True)
    loss = Loss(**json.loads(run.stdout.splitlines()[-1]))
    print(f"\nllm-compressor AWQ int4-g32-asym: KL {loss.kl:.4f}, {loss.seconds:.0f} s")
    return loss


def convert(settings: dict[str, Any], folder: Path, **choice: Any) -> tuple[Loss, dict[str, Any]]:
    """A whole run as a process; the loss as ONNX Runtime has it, and the report."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**settings, "output": str(folder / "out"), **choice}))
    stdout, seconds = process.run_stages([sys.executable, "-m", "qconvert", "run", str(recipe), "--json"])
    report = json.loads(stdout)
    assert report["passed"]
    loss = Loss(report["fidelity"][0]["kl"], seconds["quantize"])
    words = choice.get("preset") or choice["quantizer"]
    bits = report["size"]["average_bits"]
    print(f"\n{words} {report['scheme']}: KL {loss.kl:.4f}, {loss.seconds:.0f} s, {bits:.2f} bits", end="")
    return loss, report


@pytest.mark.parametrize("choice", [{"quantizer": "awq", "scheme": "int4-g32-asym"}, {"preset": "balanced"}], ids=str)
def test_awq_loses_less_in_a_twelfth_of_the_time(
    choice: dict[str, str], settings: dict[str, Any], peer: Loss, tmp_path: Path
) -> None:
    loss, report = convert(settings, tmp_path, **choice)
    print(f" = {loss.kl / peer.kl:.2f} x the KL, 1/{peer.seconds / loss.seconds:.1f} of the time")
    assert loss.kl <= 0.95 * peer.kl
    assert loss.seconds <= peer.seconds / 12
    assert report["size"]["average_bits"] <= 5.0


def test_the_best_loses_much_less_in_less_time(settings: dict[str, Any], peer: Loss, tmp_path: Path) -> None:
    loss, _ = convert(settings, tmp_path, preset="best")
    print(f" = {loss.kl / peer.kl:.2f} x the KL, {loss.seconds / peer.seconds:.2f} x the time")
    assert loss.kl <= 0.65 * peer.kl
    assert loss.seconds <= 0.6 * peer.seconds


def test_symmetric_awq_loses_a_quarter_less_than_rounding(settings: dict[str, Any], tmp_path: Path) -> None:
    for name in ("rounding", "awq"):
        (tmp_path / name).mkdir()
    rounding, _ = convert(settings, tmp_path / "rounding", quantizer="per-channel", scheme="int4-g32")
    loss, _ = convert(settings, tmp_path / "awq", quantizer="awq", scheme="int4-g32")
    print(f" = {loss.kl / rounding.kl:.2f} x rounding to nearest")
    assert loss.kl <= 0.75 * rounding.kl


def test_int8_activations_are_nearly_without_loss(settings: dict[str, Any], tmp_path: Path) -> None:
    """With all that is large in int8: the head, with float activations, is why the layout is onnx."""
    choice = {"quantizer": "smoothquant", "scheme": "int8-channel-a8", "options": {"max_outliers": 32}, "layout": "onnx"}
    loss, report = convert(settings, tmp_path, **choice, rules=[{"pattern": "lm_head", "scheme": "int8-channel"}])
    folder = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    share = folder / report["size"]["source_bytes"]
    print(f" = {share:.3f} x the bytes, prefill {report['latency'][0]['speedup']:.2f} x float")
    assert loss.kl <= 0.012
    assert share <= 0.30
