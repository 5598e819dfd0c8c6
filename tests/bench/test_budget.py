"""Schemes under a budget beside one scheme for all layers: KL to float at the same average bits, and at a bit more."""

from __future__ import annotations

import time
from pathlib import Path

from qconvert import convert

from .test_decoder import kl, recipe, size

SAME, MORE = "4.5", "5.5"
GAIN_AT_THE_SAME_SIZE = 0.9
GAIN_OF_A_BIT = 0.55


def test_a_budget_beside_one_scheme(models: Path, data: Path, tmp_path: Path) -> None:
    """At 4.5 bits, those of symmetric int4 in groups of 32, a tenth less; with one bit more, about half."""
    uniform = tmp_path / "awq int4-g32"
    made = recipe(models, data, uniform, quantizer="awq", scheme="int4-g32")
    reports = {uniform.name: convert(made)}
    seconds = {}
    for budget in (SAME, MORE):
        folder = tmp_path / f"auto {budget}"
        before = time.perf_counter()
        reports[folder.name] = convert(recipe(models, data, folder, quantizer="auto", budget=budget))
        seconds[folder.name] = time.perf_counter() - before
    lost = kl([tmp_path / name for name in reports], made)
    for name, report in reports.items():
        predicted = "" if report.assignment is None else f" (predicted {report.assignment.predicted_kl:.4f})"
        taken = f", {seconds[name]:.0f} s in all" if name in seconds else ""
        bits, bytes_ = report.size.average_bits, size(tmp_path / name) / 1e6
        measured = f"KL {lost[name]:.4f}{predicted}, {lost[name] / lost[uniform.name]:.2f} x"
        print(f"\n{name:14}{bits:.3f} bits, {bytes_:.1f} MB, {measured}{taken}", end="")
    print()
    assert reports[f"auto {SAME}"].size.average_bits <= reports[uniform.name].size.average_bits
    assert lost[f"auto {SAME}"] <= GAIN_AT_THE_SAME_SIZE * lost[uniform.name]
    assert lost[f"auto {MORE}"] <= GAIN_OF_A_BIT * lost[uniform.name]
