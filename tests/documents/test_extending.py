"""docs/extending.md: its diffs, applied to a copy of the package, give a number format, target, task and loader that work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors import safe_open
from tiny_models import tiny_bert

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in GUIDE.split("\n## ")[1:]}
KINDS = ("A number format", "A target", "A task", "A loader")
MOST_FILES = 5


def steps(kind: str) -> dict[str, list[str]]:
    """File -> the diffs of it, in order: those that follow its numbered step."""
    found: dict[str, list[str]] = {}
    for step in re.split(r"^\d+\. (?=`)", SECTIONS[kind], flags=re.MULTILINE)[1:]:
        file = step.split("`")[1]
        found.setdefault(file, []).extend(re.findall(r"^```diff\n(.*?)^```", step, re.MULTILINE | re.DOTALL))
    return found


def applied(text: str, diff: str) -> str:
    """The text with one change made: what is kept or removed has to be there, once, as it stands in the diff."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -\n")
    assert text.count(old) == 1, f"it is there {text.count(old)} times:\n{old}"
    return text.replace(old, "".join(line[1:] for line in lines if line[0] in " +"))


def apply(kind: str, folder: Path) -> None:
    for file, diffs in steps(kind).items():
        path = folder / file
        for diff in diffs:
            path.write_text(applied(path.read_text("utf-8"), diff) if path.exists() else diff.replace("\n+", "\n")[1:], "utf-8")


def convert(folder: Path, model: Path, *flags: str) -> dict[str, Any]:
    """The report of `qconvert run` with the package in `folder`, where it holds one; the artifact is in its `out`."""
    command = [sys.executable, "-m", "qconvert", "run", "--model", str(model), "--output", "out", "--json", *flags]
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_touches_more_than_five_files(kind: str) -> None:
    assert 1 <= len(steps(kind)) <= MOST_FILES
    assert all(steps(kind).values())


def test_a_number_format_a_target_and_a_task_that_the_guide_adds_are_converted_and_verified(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "qconvert", tmp_path / "qconvert", ignore=shutil.ignore_patterns("__pycache__"))
    for kind in ("A number format", "A target", "A task"):
        apply(kind, tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("evaluation: {samples: 4, length: 32}\n")
    model = tiny_bert(tmp_path / "tiny")
    flags = ("--quantizer", "per-channel", "--scheme", "int2-g32", "--target", "cpu", "--target", "mobile")
    report = convert(tmp_path, model, *flags, str(recipe))
    assert (report["task"], report["scheme"]) == ("text-vector", "int2-g32")
    assert {part["target"]: part["status"] for part in report["parity"]} == dict.fromkeys(
        ("cpu", "mobile", "transformers", "float"), "passed"
    )
    assert [part["target"] for part in report["fidelity"]] == ["cpu", "mobile"]
    for part in report["fidelity"]:
        assert part["cosine"] > 0
        assert "top1" not in part
    for name in ("model.onnx", "model.mobile.onnx"):
        graph = onnx.load(tmp_path / "out" / name, load_external_data=False).graph
        assert [value.name for value in graph.output] == ["text_vector"]
        bits = [
            each.i for node in graph.node if node.op_type == "MatMulNBits" for each in node.attribute if each.name == "bits"
        ]
        assert bits
        assert set(bits) == {2}
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as weights:  # 64 codes of 2 bits are 4 words
        assert weights.get_slice("encoder.layer.0.attention.self.query.weight_packed").get_shape() == [64, 4]
    assert "AutoModel" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_the_loader_of_the_guide_gives_a_model_that_is_converted_and_verified(tmp_path: Path) -> None:
    apply("A loader", tmp_path)
    generator = np.random.default_rng(0)
    shapes = {"0.weight": (96, 64), "0.bias": (96,), "2.weight": (32, 96), "2.bias": (32,)}
    arrays = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "net.npz", **arrays)  # type: ignore[arg-type]
    report = convert(
        tmp_path, tmp_path / "net.npz", "--plugin", "npz_loader.py", "--quantizer", "absmax", "--scheme", "int8-channel"
    )
    assert report["task"] == "module"
    assert {part["target"]: part["status"] for part in report["parity"]} == {"cpu": "passed", "float": "passed"}
    assert report["fidelity"][0]["cosine"] > 0.999
    assert {layer["name"] for layer in report["layers"]} == {"0", "2"}
