"""What it costs that int8 graphs choose their weights by processor: beside the same graph with signed weights alone.

Prints times and memory of creating a session, and times of runs, as ratios. AVX2 without VNNI takes the unsigned form.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
from forced_processor import forced
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qconvert import Recipe, convert
from qconvert.export.processors import FLIPPED

PROCESSES = 8
SCRIPT = Path(__file__).with_name("session_cost.py")


def without_question(path: Path) -> Path:
    """A copy of the graph beside it with signed weights alone, as if every processor had VNNI."""
    model = onnx_ir.load(path)
    graph = model.graph
    for node in [node for node in graph if node.op_type == "If" and node.name != FLIPPED]:
        branch = node.attributes["then_branch"].as_graph()
        (output,), inner = branch.outputs, list(branch)
        branch.outputs.clear()
        branch.remove(inner)
        graph.insert_before(node, inner)
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], output, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)
    copy = path.with_name("signed_alone.onnx")
    onnx_ir.save(model, copy)
    assert not {node.op_type for node in onnx.load(copy, load_external_data=False).graph.node} & {"If", "BitwiseXor"}
    return copy


def least(paths: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Of several processes for each graph, in turns: the least of every number."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
    for _ in range(PROCESSES):
        for name, path in paths.items():
            ran = subprocess.run([sys.executable, SCRIPT, path], capture_output=True, text=True, check=True)
            found[name].append(json.loads(ran.stdout))
    return {name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}


@pytest.mark.parametrize("name", ["minilm", "smollm2-offgrid"])
def test_the_choice_costs_nothing_once_it_is_made(name: str, models: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": str(models / name),
        "output": str(tmp_path / name),
        "preset": "int8",
        "verify": False,
    }
    if name != "minilm":
        settings["rules"] = [{"pattern": "lm_head", "scheme": "int8-channel-a8"}]
    convert(Recipe.from_settings(settings))
    path = tmp_path / name / "model.onnx"
    numbers = least({"signed alone": without_question(path), "asks": path, "unsigned": forced(path, exact=False)})
    alone = numbers["signed alone"]
    for form, measured in numbers.items():
        print(name, form, *(f"{key} {value:.4g} ({value / alone[key]:.2f} x)" for key, value in measured.items()), sep="\n  ")
