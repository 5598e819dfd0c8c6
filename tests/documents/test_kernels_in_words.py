"""What README and card say that the kernels of ONNX Runtime do with activations and weights, from folders on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from generation import keep_activations_of_graph_float
from onnx import TensorProto

from qconvert.ir.artifact import CARD, GRAPH
from qconvert.ort.compare import largest_difference
from qconvert.ort.session import file_session, session_options
from qconvert.pipeline.conversion import convert
from qconvert.recipe import Recipe

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
FACTORY = """
import torch

def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)), torch.randn(8, 64)

def convolution():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3)), torch.randn(8, 3, 6, 6)
"""


def converted(folder: Path, function: str, scheme: str) -> Path:
    (folder / "net.py").write_text(FACTORY)
    output, data = folder / scheme, {"samples": 4}
    settings = {"model": f"module:{folder / 'net.py'}:{function}", "output": str(output), "scheme": scheme}
    convert(Recipe.from_settings({**settings, "calibration": data, "evaluation": data, "verify": False}))
    return output


def run(graph: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = file_session(graph)
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    return np.asarray(found)


def rows(count: int) -> np.ndarray[Any, Any]:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(1)).numpy()


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel"])
def test_matmul_nbits_rounds_float_activations_to_int8(scheme: str, tmp_path: Path) -> None:
    output, x = converted(tmp_path, "linear", scheme), rows(4)
    words = (
        "MatMulNBits at accuracy_level 4: the weights are those stored, but the kernel itself quantizes activations to int8."
    )
    assert words in (output / CARD).read_text(encoding="utf-8")
    assert "| `int4`, `int8` with float activations | MatMulNBits; the kernel itself rounds activations to int8 |" in README
    exact = shutil.copyfile(output / GRAPH, output / "exact.onnx")
    keep_activations_of_graph_float(exact)
    error = largest_difference(run(output / GRAPH, x), run(exact, x))
    assert 1e-4 < error < 1 / 127


def test_layers_with_int8_activations_have_one_scale_per_row(tmp_path: Path) -> None:
    output, x = converted(tmp_path, "linear", "int8-channel-a8"), rows(4)
    words = "Layers whose scheme ends in -a8 quantize their activations to int8 at run time on the CPU, with one scale per row."
    assert words in (output / CARD).read_text(encoding="utf-8")
    alone = run(output / GRAPH, x)
    beside = run(output / GRAPH, np.concatenate([x, 1000 * x]))
    assert np.array_equal(beside[:4], alone)  # whatever the other rows are
    spike = x.copy()
    spike[:, 0] = 1000  # in the same row
    weight = run(output / GRAPH, np.eye(64, dtype=np.float32))
    assert largest_difference(alone, x @ weight) < 0.02
    lost = run(output / GRAPH, spike) - 1000 * weight[0] - x[:, 1:] @ weight[1:]
    assert np.abs(lost).max() > 10 * np.abs(alone - x @ weight).max()


def test_the_weights_of_a_convolution_are_dequantized_when_the_graph_is_loaded(tmp_path: Path) -> None:
    assert "Conv2d becomes small on disk, not fast: its weights are dequantized when the graph is loaded." in README
    output = converted(tmp_path, "convolution", "int8-channel")
    options = session_options()
    options.optimized_model_filepath = str(output / "optimized.onnx")
    onnxruntime.InferenceSession(output / GRAPH, options, providers=["CPUExecutionProvider"])
    stored, loaded = (onnx.load(output / name, load_external_data=False).graph for name in (GRAPH, "optimized.onnx"))
    arithmetic = {"Cast", "Sub", "Mul", "DequantizeLinear"}
    assert arithmetic & {node.op_type for node in stored.node}
    (convolution,) = [node for node in loaded.node if "Conv" in node.op_type]
    kinds = {tensor.name: tensor.data_type for tensor in loaded.initializer}
    assert kinds[convolution.input[1]] == TensorProto.FLOAT
    assert not arithmetic & {node.op_type for node in loaded.node}
