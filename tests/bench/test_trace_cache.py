"""Time of a conversion whose template was traced before, beside the first one and one that keeps nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

QCONVERT = [sys.executable, "-m", "qconvert", "run", "--quantizer", "absmax", "--scheme", "int4-g32", "--no-verify", "--force"]
ROUNDS = 3


@dataclass(frozen=True)
class Time:
    """Seconds that passed, and that the processors worked: the second does not depend on what else runs."""

    wall: float
    processor: float


def convert(model: Path, output: Path, cache: Path | None) -> Time:
    # One thread: several spin while they wait for each other, so that their processor time tells how busy the machine is.
    environment = {**os.environ, "QCONVERT_CACHE": str(cache or ""), "OMP_NUM_THREADS": "1"}
    before, begin = os.times(), time.perf_counter()
    subprocess.run(
        [*QCONVERT, "--model", str(model), "--output", str(output)], env=environment, capture_output=True, check=True
    )
    wall, after = time.perf_counter() - begin, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return Time(wall, processor)


def test_a_second_conversion_of_a_decoder(models: Path, tmp_path: Path) -> None:
    """Alternating; the least of each."""
    cache = tmp_path / "cache"
    times: dict[str, list[Time]] = {"without": [], "first": [], "second": []}
    for _ in range(ROUNDS):
        shutil.rmtree(cache, ignore_errors=True)
        for name, folder in (("without", None), ("first", cache), ("second", cache)):
            times[name].append(convert(models / "smollm2", tmp_path / "output", folder))
    print()
    least = {}
    for kind in ("wall", "processor"):
        seconds = {name: min(getattr(each, kind) for each in found) for name, found in times.items()}
        least[kind] = seconds["second"] / seconds["first"], seconds["first"] / seconds["without"]
        print(f"{kind}: {', '.join(f'{name} {value:.2f} s' for name, value in seconds.items())}")
        print(f"{kind}: second {least[kind][0]:.2f} x the first, first {least[kind][1]:.2f} x one without a cache")
    assert least["processor"][0] < 0.8
    assert least["processor"][1] < 1.05
