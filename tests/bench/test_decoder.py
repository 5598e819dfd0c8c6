"""Decoders in onnxruntime-genai: int4 beside its model builder's artifact, int8 beside float and quantize_dynamic."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.quantization import QuantType, quantize_dynamic

from qconvert import Recipe, convert
from qconvert.calibrate import read_samples
from qconvert.graph.float_graph import float_graph
from qconvert.ir.artifact import GENAI_CONFIG, GRAPH
from qconvert.ir.progress import silent
from qconvert.ir.task import TASKS
from qconvert.load import load
from qconvert.ort.session import file_session, memory_session
from qconvert.trace import trace
from qconvert.verify.fidelity import measure_fidelity

from .generation_speed import PROMPT

ROUNDS = 8


class FedLike:
    """A session that takes the inputs of another one: the builder's does not say what shape its cache has."""

    def __init__(self, session: Any, other: Any) -> None:
        self.run, self.get_inputs = session.run, other.get_inputs


def race(
    folders: Sequence[Path], prompt: int = PROMPT, rounds: int = ROUNDS, pieces: Sequence[int] = ()
) -> dict[str, tuple[list[float], list[float]]]:
    """Folder name -> (seconds for the prompt, seconds per new token), one entry per round.

    pieces: (tokens that are read at once,), where a prompt is not read whole.

    Each runs alone: idle threads of another session would take the cores. All take turns, in processes of their own, because
    where a model comes to lie in memory moves its speed by up to 10 %.
    """
    seconds: dict[str, tuple[list[float], list[float]]] = {folder.name: ([], []) for folder in folders}
    for number in range(rounds):
        for folder in folders if number % 2 == 0 else folders[::-1]:
            script = str(Path(__file__).with_name("generation_speed.py"))
            command = [sys.executable, script, str(folder), *map(str, (prompt, *pieces))]
            measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for taken, value in zip(seconds[folder.name], measured, strict=True):
                taken.append(value)
    return seconds


def show(
    seconds: dict[str, tuple[list[float], list[float]]], base: str, words: dict[str, str], length: int = PROMPT
) -> dict[str, tuple[float, float]]:
    """Print a line per folder; returns name -> how many times as fast as `base` it is, (prompt, new tokens)."""
    ratios = {}
    for name, parts in seconds.items():
        both = [[b / a for a, b in zip(parts[part], seconds[base][part], strict=True)] for part in (0, 1)]
        ratios[name] = median(both[0]), median(both[1])
        prompt = f"{length / median(parts[0]):7.0f} tokens/s prefill ({ratios[name][0]:.2f} x {base})"
        new = f"{1 / median(parts[1]):7.0f} decode ({ratios[name][1]:.2f} x, {min(both[1]):.2f} to {max(both[1]):.2f})"
        print(f"\n{name:18}{prompt}{new}  {words[name]}", end="")
    print()
    return ratios


def recipe(models: Path, data: Path, output: Path, **settings: Any) -> Recipe:
    return Recipe.from_settings(
        {
            "model": str(models / "smollm2-offgrid"),
            "calibration": {"source": str(data / "calibration.txt"), "samples": 32, "length": 256},
            "evaluation": {"source": str(data / "evaluation.txt"), "samples": 24, "length": 256},
            "verify": False,
            "output": output,
            **settings,
        }
    )


def kl(folders: Iterable[Path], of: Recipe) -> dict[str, float]:
    """Folder name -> KL to the float model."""
    model = load(of.model, lambda source: None)
    baseline = memory_session(float_graph(trace(model).graphs["model"], model.parameter_shapes), model.read)
    batches = read_samples(model, of.model_copy(update={"verify": True}), calibrated=False).evaluation
    found = {}
    for folder in folders:
        session = FedLike(file_session(folder / GRAPH), baseline)
        measured = measure_fidelity(session, baseline, batches, TASKS["causal-lm"], "cpu", silent).kl
        assert measured is not None
        found[folder.name] = measured
    return found


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def test_int4_beside_the_builder(models: Path, data: Path, tmp_path: Path) -> None:
    """At least as fast in prefill and decoding, no larger, and nearer to the float model; head and embedding int4 in both."""
    pytest.importorskip("onnxruntime_genai")
    builder, ours = tmp_path / "builder", tmp_path / "qconvert"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    source = str(models / "smollm2-offgrid")
    subprocess.run([*command, "-m", source, "-o", str(builder), "-c", str(tmp_path / "cache")], check=True, capture_output=True)
    made = recipe(models, data, ours, quantizer="awq", scheme="int4-g32", rules=[{"pattern": "lm_head", "scheme": "int4-g32"}])
    convert(made)
    lost = kl((builder, ours), made)
    words = {folder.name: f"{size(folder) / 1e6:.1f} MB, KL {lost[folder.name]:.4f}" for folder in (builder, ours)}
    prefill, decode = show(race((builder, ours)), "builder", words)["qconvert"]
    assert size(ours) <= size(builder)
    assert lost["qconvert"] < lost["builder"]
    assert prefill >= 1.0
    assert decode >= 1.0


def write_float(source: Path, artifact: Path, folder: Path) -> None:
    """The float graph that qconvert compares with, as a folder that runs in onnxruntime-genai like `artifact`.

    Its weights are transposed here: quantize_dynamic looks for products with an initializer.
    """
    model = load(str(source), lambda name: None)
    graph = float_graph(trace(model).graphs["model"], model.parameter_shapes)
    for name, value in graph.graph.initializers.items():
        if isinstance(value.const_value, onnx_ir.LazyTensor):
            value.const_value = onnx_ir.tensor(model.read(name).float().numpy(), name=name)
    for node in [node for node in graph.graph if node.op_type == "Transpose" and node.inputs[0].is_initializer()]:  # type: ignore[union-attr]
        name = f"{node.inputs[0].name}/transposed"  # type: ignore[union-attr]
        tensor = onnx_ir.tensor(np.ascontiguousarray(node.inputs[0].const_value.numpy().T), name=name)  # type: ignore[union-attr]
        graph.graph.register_initializer(weight := onnx_ir.val(name, tensor.dtype, tensor.shape, const_value=tensor))  # type: ignore[arg-type]
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], weight)
    RemoveUnusedNodesPass()(graph)
    folder.mkdir()
    onnx_ir.save(graph, folder / GRAPH, external_data="model.data")
    for path in [artifact / GENAI_CONFIG, *artifact.glob("tokenizer*")]:
        shutil.copy(path, folder)


def test_int8_activations_beside_float_and_quantize_dynamic(models: Path, data: Path, tmp_path: Path) -> None:
    """New tokens as fast as quantize_dynamic's, which runs the same integer kernels, at a tenth of its KL; the head int8 too.

    It has one step for a whole prompt, ours has one per token: three passes over each input, and the product with the step.
    That is an eighth of the time of a prompt, on processors with AMX and on those with VNNI alone; the limit is a sixth.
    How much faster than float either is depends on the processor: quantize_dynamic 2.7 x with AMX, 2.0 x without.
    The same codes by MatMulNBits are shown beside: for one row they are no faster (docs/processors.md).
    """
    pytest.importorskip("onnxruntime_genai")
    ours, plain, dynamic = tmp_path / "per-channel", tmp_path / "float", tmp_path / "quantize_dynamic"
    head = {"rules": [{"pattern": "lm_head", "scheme": "int8-channel-a8"}]}
    made = recipe(models, data, ours, quantizer="per-channel", **head)
    convert(made)
    outliers = tmp_path / "llm-int8"
    convert(recipe(models, data, outliers, quantizer="llm-int8", **head))
    by_blocks = tmp_path / "MatMulNBits"
    blocks = {"scheme": "int8-channel", "rules": [{"pattern": "lm_head", "scheme": "int8-channel"}]}
    convert(recipe(models, data, by_blocks, quantizer="per-channel", **blocks))
    write_float(models / "smollm2-offgrid", ours, plain)
    shutil.copytree(plain, dynamic, ignore=shutil.ignore_patterns("model.*"))
    quantize_dynamic(
        plain / GRAPH, dynamic / GRAPH, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"]
    )
    folders = (plain, dynamic, ours, outliers, by_blocks)
    lost = kl(folders, made)
    words = {folder.name: f"{size(folder) / 1e6:.1f} MB, KL {lost[folder.name]:.4f}" for folder in folders}
    ratios = show(race(folders), "float", words)
    assert lost["per-channel"] <= 0.05
    assert lost["llm-int8"] <= 0.03
    (prefill, decode), (peer_prefill, peer_decode) = ratios["per-channel"], ratios["quantize_dynamic"]
    assert prefill >= peer_prefill * 5 / 6
    assert decode >= 0.95 * peer_decode
