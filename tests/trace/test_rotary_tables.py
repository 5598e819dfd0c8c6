"""Tables of rotary embeddings are computed when a model is loaded, to a rounding error: nothing of them is on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from tiny_models import tiny_llama
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qconvert import Recipe, convert
from qconvert.graph.values import constant
from qconvert.ir.artifact import GRAPH, REPORT
from qconvert.trace.rotary_tables import TOLERANCE, compute_rotary_tables

HALF = 64
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32768}


def tables(settings: dict[str, Any], positions: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """cos and sin [positions, HALF] as transformers computes them."""
    config = LlamaConfig(hidden_size=2 * HALF, num_attention_heads=1, max_position_embeddings=positions)
    config.rope_parameters = settings
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(positions)[None])
    return cos[0, :, :HALF].numpy(), sin[0, :, :HALF].numpy()


def attention_with(cos: np.ndarray[Any, Any], sin: np.ndarray[Any, Any]) -> onnx_ir.Model:
    """A graph of one attention, with these tables behind its seven other inputs, and they as outputs."""
    values = [constant(name, table) for name, table in (("cos", cos), ("sin", sin))]
    attention = onnx_ir.node("GroupQueryAttention", [*[None] * 7, *values], domain="com.microsoft", name="attention")
    shown = [onnx_ir.node("Identity", [value], name=f"{value.name}_out") for value in values]
    outputs = [onnx_ir.Value(name=f"y{index}", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)) for index in range(2)]
    for node, output in zip(shown, outputs, strict=True):
        node.outputs[0].name, node.outputs[0].type = output.name, output.type
    graph = onnx_ir.Graph(
        [],
        [node.outputs[0] for node in shown],
        nodes=[attention, *shown],
        initializers=values,
        opset_imports={"": 23},
        name="g",
    )
    return onnx_ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, 8192),
        ({"rope_type": "default", "rope_theta": 1000000.0}, 40960),
        ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}, 100),
        (LLAMA3, 131072),
        (YARN, 131072),
        ({"rope_type": "default", "rope_theta": 10000.0}, 1),
    ],
    ids=["llama", "qwen", "linear", "llama3", "yarn", "one position"],
)
def test_tables_are_computed_to_a_rounding_error(settings: dict[str, Any], positions: int) -> None:
    expected = tables(settings, positions)
    model = attention_with(*expected)
    compute_rotary_tables(model.graph)
    attention = next(node for node in model.graph if node.name == "attention")
    assert [value.producer() is not None for value in attention.inputs[7:] if value is not None] == [True, True]
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value) < 1000
    model.graph.remove(attention)
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    for table, found in zip(expected, session.run(None, {}), strict=True):
        assert found.shape == table.shape
        assert np.abs(found - table).max() <= TOLERANCE * expected[0][0, 0]


def test_tables_of_another_kind_are_kept() -> None:
    cos, sin = tables({"rope_type": "default", "rope_theta": 10000.0}, 512)
    bent = cos.copy()
    bent[300, 5] += 1e-3
    for pair in ((bent, sin), (cos, -2 * sin), (cos, cos)):
        model = attention_with(*pair)
        compute_rotary_tables(model.graph)
        assert [value.name for value in model.graph.initializers.values()] == ["cos", "sin"]


def test_a_converted_decoder_has_no_table_in_its_files(tmp_path: Path) -> None:
    data = {"samples": 2, "length": 32}
    named = {"model": str(tiny_llama(tmp_path / "source")), "output": str(tmp_path / "out"), "scheme": "int8-channel"}
    convert(Recipe.from_settings({**named, "calibration": data, "evaluation": data}))
    graph = onnx_ir.load(tmp_path / "out" / GRAPH).graph
    attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert attentions
    assert {value.producer().op_type for node in attentions for value in node.inputs[7:9]} == {"Cos", "Sin"}  # type: ignore[union-attr]
    assert not [name for name in graph.initializers if name.endswith("_cache")]
    report = json.loads((tmp_path / "out" / REPORT).read_text(encoding="utf-8"))
    assert {check["status"] for check in report["parity"]} == {"passed"}
