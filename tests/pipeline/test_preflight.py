"""What is wrong at first sight is told first: before torch is imported, and what only a model can tell before it is traced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tiny_models import tiny_bert, tiny_llama

from qconvert.errors import QConvertError, UsageError
from qconvert.ir.artifact import MANIFEST
from qconvert.pipeline import comparison as comparing
from qconvert.pipeline import conversion, preflight, preparation
from qconvert.plugin.host.manager import CALIBRATED, plugin_manager
from qconvert.recipe import Recipe
from qconvert.recipe.comparison import named_recipes
from qconvert.storage.manifest import KEYS

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "numpy")
COMMAND = f"""
import json, sys
from qconvert.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print(json.dumps([ended.code, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as far as a first look goes, a factory, data, and what stands where an output is to go."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    (tmp_path / "net.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "text.txt").write_text("Words.")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / MANIFEST).write_text("{}")
    (tmp_path / "file").touch()
    return tmp_path


def told(folder: Path, *arguments: str) -> dict[str, Any]:
    """The error of a command that has imported nothing heavy, with its exit code."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments, "--json"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "QCONVERT_PLUGINS": ""},
    )
    document, _, ending = done.stdout.rstrip().rpartition("\n")
    exit_code, imported = json.loads(ending)
    assert imported == [], done.stderr
    return {**json.loads(document)["error"], "exit_code": exit_code}


RUN = {"--model": "llama", "--output": "out"}
FAULTS: list[tuple[Mapping[str, str], str, int]] = [
    ({"--model": "nowhere"}, "QC-INPUT-001", 3),
    ({"--model": "file"}, "QC-INPUT-002", 3),
    ({"--model": "pkg:no_such_package_at_all/x"}, "QC-INPUT-020", 3),
    ({"--model": "module:absent.py:make"}, "QC-INPUT-021", 3),
    ({"--output": "old"}, "QC-OUTPUT-004", 2),
    ({"--output": "file"}, "QC-OUTPUT-003", 2),
    ({"--output": "llama/out"}, "QC-OUTPUT-001", 2),
    ({"--output": "."}, "QC-OUTPUT-001", 2),
    ({"--quantizer": "awqq"}, "QC-PLUGIN-002", 2),
    ({"--plugin": "absent.py"}, "QC-PLUGIN-009", 2),
    ({"--evaluation": "absent.txt"}, "QC-DATA-001", 3),
    ({"--evaluation": "text.docx"}, "QC-DATA-002", 2),
    ({"--quantizer": "awq", "--calibration": "absent.txt", "--evaluation": "text.txt"}, "QC-DATA-001", 3),
    ({"--gate": "cosine>=0.9"}, "QC-GATE-002", 2),
    ({"--model": "module:net.py:make", "--gate": "kl<=1"}, "QC-GATE-002", 2),
    ({"--scheme": "int4-g32-a8"}, "QC-PLAN-001", 2),
    ({"--scheme": "int4-g32-asym", "--target": "cuda"}, "QC-PLAN-007", 2),
]


@pytest.mark.parametrize(
    ("flags", "code", "exit_code"), FAULTS, ids=[" ".join(map("=".join, case[0].items())) for case in FAULTS]
)
def test_a_fault_is_told_before_anything_heavy_is_imported(
    flags: Mapping[str, str], code: str, exit_code: int, folder: Path
) -> None:
    error = told(folder, "run", *(word for pair in {**RUN, **flags}.items() for word in pair))
    assert (error["code"], error["exit_code"]) == (code, exit_code)


LOADER = """
import qconvert

@qconvert.hookimpl
def load_model(source):
    raise RuntimeError("asked")
"""


@pytest.mark.parametrize("model", ["/nowhere/llama", "./nowhere", "../nowhere/x", "~/nowhere"])
def test_a_path_that_is_missing_is_told_at_once_although_a_plugin_loads_models(model: str, folder: Path) -> None:
    (folder / "loader.py").write_text(LOADER)
    error = told(folder, "run", "--plugin", "loader.py", "--model", model, "--output", "out")
    assert (error["code"], error["exit_code"]) == ("QC-INPUT-001", 3)


@pytest.mark.parametrize("model", ["nowhere/llama", "acme:llama", "./file", "file"])
def test_names_and_files_are_for_a_plugin_that_loads_models_to_know(model: str, folder: Path) -> None:
    (folder / "loader.py").write_text(LOADER)
    checked(folder, model=model.replace("./", f"{folder}/"), plugins=[str(folder / "loader.py")])


@pytest.mark.parametrize("command", ["plan", "compare"])
@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ({"--output": "llama/out"}, "QC-OUTPUT-001"),
        ({"--evaluation": "absent.txt"}, "QC-DATA-001"),
        ({"--model": "x"}, "QC-INPUT-001"),
    ],
)
def test_so_it_is_by_other_commands(command: str, flags: Mapping[str, str], code: str, folder: Path) -> None:
    tries = ["--try", "awq", "--try", "absmax"] if command == "compare" else []
    assert told(folder, command, *(word for pair in {**RUN, **flags}.items() for word in pair), *tries)["code"] == code


def test_compare_names_an_unknown_quantizer_and_a_comparison_that_is_there(folder: Path) -> None:
    base = ["compare", "--model", "llama", "--output", "out"]
    assert told(folder, *base, "--try", "awq", "--try", "awqq")["code"] == "QC-PLUGIN-002"
    (folder / "out").mkdir()
    (folder / "out" / "compare.json").touch()
    assert told(folder, *base, "--try", "awq")["code"] == "QC-OUTPUT-004"


def test_verify_names_a_folder_that_is_none_and_data_that_is_missing(folder: Path) -> None:
    assert told(folder, "verify", "nowhere")["code"] == "QC-READ-001"
    recipe = Recipe(model="../llama", output=Path()).model_dump(mode="json")
    manifest = {key: {} for key in KEYS} | {"schema": 1, "recipe": recipe}
    (folder / "old" / MANIFEST).write_text(json.dumps(manifest))
    assert told(folder, "verify", "old", "--evaluation", "absent.txt")["code"] == "QC-DATA-001"
    both = recipe | {"calibration": {**recipe["calibration"], "source": "absent.txt"}}  # which judges where nothing else does
    (folder / "old" / MANIFEST).write_text(json.dumps(manifest | {"recipe": both}))
    assert told(folder, "verify", "old")["code"] == "QC-DATA-001"
    assert told(folder, "verify", "old", "--gate", "cosine>=0.9")["code"] == "QC-GATE-002"


# --- what is no fault ---


def checked(folder: Path, **settings: Any) -> None:
    preflight.check(Recipe.from_settings({"model": str(folder / "llama"), "output": str(folder / "out"), **settings}))


def test_data_that_a_run_does_not_read_need_not_be_there(folder: Path) -> None:
    checked(folder, calibration={"source": "absent.txt"}, evaluation={"source": str(folder / "text.txt")})
    checked(folder, calibration={"source": "absent.txt"}, verify=False)
    with pytest.raises(QConvertError, match="QC-DATA-001"):
        checked(folder, calibration={"source": "absent.txt"}, verify=False, tuning={"steps": 1})


def test_a_scheme_that_rules_may_replace_is_for_the_plan_to_judge(folder: Path) -> None:
    checked(folder, scheme="int4-g32-asym", targets=["cuda"], rules=[{"pattern": "*", "scheme": "int4-g32"}])


def test_data_inside_the_output_is_not_deleted_with_it(folder: Path) -> None:
    (folder / "old" / "text.txt").write_text("Words.")
    with pytest.raises(UsageError, match="QC-OUTPUT-001"):
        checked(folder, output=str(folder / "old"), force=True, evaluation={"source": str(folder / "old" / "text.txt")})


def test_another_run_on_the_same_output_is_told_at_once(folder: Path) -> None:
    with FileLock(folder / ".out.qconvert.lock"), pytest.raises(QConvertError, match="QC-LOCK-001"):
        checked(folder)
    (folder / ".out.qconvert.lock").touch()  # left by a run that was killed
    checked(folder)


def test_which_quantizers_need_data_is_as_they_say() -> None:
    found = plugin_manager().quantizers
    own = {name: kinds[0][0] for name, kinds in found.items() if kinds[0][1].distribution.name == "qconvert"}
    assert {name for name, kind in own.items() if kind.observers} == set(CALIBRATED)


# --- what only the model can tell ---


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"gates": [{"metric": "kl", "comparison": "<=", "limit": 1}]}, "QC-GATE-002"),
        ({"logits": "last"}, "QC-PLAN-011"),
        ({"evaluation": {"length": 9999}}, "QC-DATA-005"),
        ({"device": "nonesuch"}, "QC-DEVICE-001"),
    ],
)
def test_what_a_model_can_not_do_is_told_before_it_is_traced(
    settings: dict[str, Any], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "trace", None)
    recipe = Recipe.from_settings({"model": str(tiny_bert(tmp_path / "bert")), "output": str(tmp_path / "out"), **settings})
    with pytest.raises(UsageError) as caught:
        conversion.convert(recipe)
    assert caught.value.code == code


@pytest.mark.usefixtures("quick")
def test_a_gate_of_one_recipe_stops_no_other(tmp_path: Path) -> None:
    data = {"source": "builtin", "samples": 2, "length": 16}
    common = {
        "model": str(tiny_llama(tmp_path / "llama")),
        "output": str(tmp_path / "out"),
        "evaluation": data,
        "calibration": data,
    }
    odd = {"name": "odd", "gates": [{"metric": "cosine", "comparison": ">=", "limit": 0.9}]}
    found = comparing.compare(named_recipes({**common, "recipes": [odd, {"name": "good"}]}))
    assert [entry.error and entry.error.code for entry in found.entries] == ["QC-GATE-002", None]
