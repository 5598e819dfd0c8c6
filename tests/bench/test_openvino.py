"""MiniLM in int8 beside OpenVINO's int8 of the same model, which nncf makes with the same calibration text.

QCONVERT_OPENVINO names a Python that has openvino and nncf, in an environment of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qconvert import Recipe, convert
from qconvert.calibrate import read_samples
from qconvert.ir.artifact import GRAPH
from qconvert.ir.batch import Batch
from qconvert.load import load

from .encoder_speed import session
from .test_minilm import embed, write_plain

ROUNDS = 4
# Rows, tokens, threads.
SHAPES = ((1, 16, 1), (1, 16, 2), (16, 128, 1), (16, 128, 2))
SETTINGS: dict[str, dict[str, Any]] = {
    "per-channel": {"quantizer": "per-channel"},
    "smoothquant": {"quantizer": "smoothquant", "layout": "onnx"},
    "preset int8": {"preset": "int8"},
    "static": {"quantizer": "per-channel", "scheme": "int8-channel-a8-static", "layout": "onnx"},
}


class Found:
    """What a session would give, of outputs that another process has written."""

    def __init__(self, path: Path) -> None:
        self.states = iter(np.load(path).values())

    def run(self, _: None, feeds: dict[str, Any]) -> list[Any]:
        return [next(self.states)]


def test_speed_and_cosine_beside_openvino(models: Path, data: Path, tmp_path: Path) -> None:
    """One sentence faster than OpenVINO; of batches, the ratio is printed. Nearer to float with scales or static ranges."""
    python = os.environ.get("QCONVERT_OPENVINO")
    if python is None:
        pytest.skip("QCONVERT_OPENVINO names no Python that has openvino and nncf")
    settings: dict[str, Any] = {
        "model": str(models / "minilm"),
        "calibration": {"source": str(data / "calibration.txt"), "samples": 64, "length": 128},
        "evaluation": {"source": str(data / "evaluation.txt"), "samples": 128, "length": 128},
    }
    for name, own in SETTINGS.items():
        convert(Recipe.from_settings({**settings, **own, "verify": False, "output": tmp_path / name}))
    samples = read_samples(
        load(settings["model"], lambda source: None),
        Recipe.from_settings({**settings, "output": tmp_path / "none"}),
        calibrated=True,
    )
    write_plain(models / "minilm", tmp_path / "plain.onnx", opset=18)
    for name, batches in (("calibration", samples.calibration), ("evaluation", samples.evaluation)):
        write_batches(batches, tmp_path / f"{name}.npz")
    peer = [python, str(Path(__file__).with_name("openvino_int8.py"))]
    quantized = str(tmp_path / "openvino.xml")
    call([*peer, "make", str(tmp_path / "plain.onnx"), str(tmp_path / "calibration.npz"), quantized])
    call([*peer, "outputs", quantized, str(tmp_path / "evaluation.npz"), str(tmp_path / "states.npz")])

    sessions = {name: session(tmp_path / name / GRAPH) for name in SETTINGS}
    expected = vectors(session(tmp_path / "plain.onnx"), samples.evaluation)
    cosines = {
        name: float(torch.nn.functional.cosine_similarity(vectors(each, samples.evaluation), expected).mean())
        for name, each in {**sessions, "openvino": Found(tmp_path / "states.npz")}.items()
    }
    commands = {name: [sys.executable, *speed_of(tmp_path / name / GRAPH)] for name in SETTINGS}
    commands["openvino"] = [*peer, "time", quantized]
    print(f"\n{'x openvino':14}" + "".join(f"{f'{r} x {n}, {t} threads':>22}" for r, n, t in SHAPES) + f"{'cosine':>10}")
    ratios = [ratios_to_openvino(commands, shape) for shape in SHAPES]
    for name, cosine in cosines.items():
        print(f"{name:14}" + "".join(f"{each[name]:22.2f}" for each in ratios) + f"{cosine:10.5f}")
    assert ratios[0]["per-channel"] > 1
    assert cosines["smoothquant"] > cosines["openvino"]


def speed_of(graph: Path) -> list[str]:
    return [str(Path(__file__).with_name("encoder_speed.py")), str(graph)]


def write_batches(batches: Sequence[Batch], path: Path) -> None:
    named = {f"{number}.{name}": value.numpy() for number, batch in enumerate(batches) for name, value in batch.items()}
    np.savez(path, **named)


def vectors(run: Any, batches: Sequence[Batch]) -> torch.Tensor:
    return torch.cat([embed(run, batch) for batch in batches])


def ratios_to_openvino(commands: dict[str, list[str]], shape: tuple[int, int, int]) -> dict[str, float]:
    """Name -> how many times as fast as OpenVINO, by the least seconds of several processes, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            seconds[name].append(float(call([*command, *map(str, shape)])))
    return {name: min(seconds["openvino"]) / min(taken) for name, taken in seconds.items()}


def call(command: list[str]) -> str:
    """The last line that a command prints."""
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return printed[-1] if printed else ""
