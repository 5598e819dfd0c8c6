"""What the quantizers lose on a decoder whose weights lie on no grid: KL to float on held-out text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from . import process

LIMITS = {"llm-int8": ("int8-channel-a8", 0.03), "awq": ("int4-g32-asym", 0.14), "zero-point": ("int4-g32-asym", None)}
QUANTIZE_SECONDS = 90


@pytest.mark.parametrize("quantizer", LIMITS)
def test_kl(quantizer: str, models: Path, data: Path, tmp_path: Path) -> None:
    """KL of next tokens against float on 24 x 256 tokens, calibrated on 32 x 256; zero-point stands for plain rounding."""
    scheme, limit = LIMITS[quantizer]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {models / 'smollm2-offgrid'}\noutput: {tmp_path / 'out'}\nquantizer: {quantizer}\nscheme: {scheme}\n"
        f"calibration: {{source: {data / 'calibration.txt'}, samples: 32, length: 256}}\n"
        f"evaluation: {{source: {data / 'evaluation.txt'}, samples: 24, length: 256}}\n"
    )
    stdout, seconds = process.run_stages([sys.executable, "-m", "qconvert", "run", str(recipe), "--json"])
    report = json.loads(stdout)
    found, speed = report["fidelity"][0], report["latency"][0]
    print(f"\n{quantizer} {scheme}: KL {found['kl']:.4f}, top-1 {found['top1']:.3f}, {report['size']['ratio']:.2f} x the bytes")
    print(
        f"perplexity {found['perplexity']:.2f} (float {found['perplexity_float']:.2f}), {seconds['quantize']:.0f} s to quantize"
    )
    print(f"prefill {speed['speedup']:.2f} x float, decode {speed['decode_tokens_per_s']:.0f} tokens/s")
    assert report["passed"]
    assert limit is None or found["kl"] <= limit
    assert seconds["quantize"] <= QUANTIZE_SECONDS
