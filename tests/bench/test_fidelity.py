"""What the quantizers lose on a decoder whose weights lie on no grid: KL to float on held-out text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from qconvert import Recipe, convert

LIMITS = {"llm-int8": ("int8-channel-a8", 0.03), "awq": ("int4-g32-asym", 0.14), "zero-point": ("int4-g32-asym", None)}
QUANTIZE_SECONDS = 90


class Watch:
    """Seconds of each stage of a run."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, float]] = []

    def stage(self, name: str, total: int | None) -> None:
        self.begun.append((name, time.perf_counter()))

    def advance(self, n: int = 1) -> None:
        pass

    def seconds(self, stage: str) -> float:
        index = next(i for i, (name, _) in enumerate(self.begun) if name == stage)
        return self.begun[index + 1][1] - self.begun[index][1]


@pytest.mark.parametrize("quantizer", LIMITS)
def test_kl(quantizer: str, models: Path, data: Path, tmp_path: Path) -> None:
    scheme, limit = LIMITS[quantizer]
    settings: dict[str, Any] = {
        "model": str(models / "smollm2-offgrid"),
        "output": tmp_path / "out",
        "quantizer": quantizer,
        "scheme": scheme,
        "calibration": {"source": str(data / "calibration.txt"), "samples": 32, "length": 256},
        "evaluation": {"source": str(data / "evaluation.txt"), "samples": 24, "length": 256},
    }
    watch = Watch()
    report = convert(Recipe.from_settings(settings), watch)
    found, speed = report.fidelity[0], report.latency[0]
    print(f"\n{quantizer} {scheme}: KL {found.kl:.4f}, top-1 {found.top1:.3f}, {report.size.ratio:.2f} x the bytes")
    print(
        f"perplexity {found.perplexity:.2f} (float {found.perplexity_float:.2f}), {watch.seconds('quantize'):.0f} s to quantize"
    )
    print(f"prefill {speed.speedup:.2f} x float, decode {speed.decode_tokens_per_s:.0f} tokens/s")
    assert report.passed
    assert found.kl is not None
    assert limit is None or found.kl <= limit
    assert watch.seconds("quantize") <= QUANTIZE_SECONDS
