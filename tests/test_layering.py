"""Who may import whom: the layers of pyproject.toml, from cli down to errors."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from qconvert.pipeline import conversion
from qconvert.plugin.host.manager import BUILTINS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qconvert"
STAGES = ("load", "trace", "plan", "calibrate", "allocate", "quantize", "write", "export", "verify")
SCREEN_LINES, SMALL_FILE_LINES = 50, 150


def imports(path: Path) -> set[str]:
    """The modules and packages of qconvert that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module="qconvert", names=names):
                found |= {f"qconvert.{alias.name}" for alias in names}
            case ast.ImportFrom(module=str(module), level=0):
                found.add(module)
            case ast.ImportFrom(level=level):
                assert level == 0, f"{path}: relative imports hide where a name comes from"
    return {name for name in found if name.startswith("qconvert.")}


def parts(folder: str) -> dict[str, set[str]]:
    """File -> the parts of qconvert ("ir", "load", ...) that it imports, for all files of a folder."""
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    return {path.relative_to(PACKAGE).as_posix(): {name.split(".")[1] for name in imports(path)} for path in files}


def test_the_contract_of_import_linter_is_kept() -> None:
    # In a process of its own: import-linter configures logging for all loggers there are.
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_contract_names_every_stage_and_keeps_the_stages_apart() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = settings["contracts"][0]["layers"]
    (stages,) = (layer for layer in layers if "calibrate" in layer)
    assert set(stages.split(" | ")) == {*STAGES, "quantizers", "report"}


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_another_stage(stage: str) -> None:
    others = set(STAGES) - {stage}
    assert {file: used & others for file, used in parts(stage).items() if used & others} == {}


def test_the_records_import_nothing_above_them() -> None:
    assert {file: used - {"ir", "errors"} for file, used in parts("ir").items() if used - {"ir", "errors"}} == {}


def test_the_plugin_side_imports_records_and_recipe_only() -> None:
    allowed = {"plugin", "recipe", "ir", "errors"}
    assert {file: used - allowed for file, used in parts("plugin").items() if used - allowed} == {}


def test_a_quantizer_sees_no_file_format_and_no_other_quantizer() -> None:
    files = {f"qconvert.quantizers.{path.stem}": path for path in (PACKAGE / "quantizers").glob("*.py")}
    shared = files.keys() - set(BUILTINS)  # what several quantizers search with, e.g. clip_search

    def foreign(name: str) -> bool:
        return name not in shared and name.split(".")[1] not in {"plugin", "ir"}

    assert {module: found for module, path in files.items() if (found := set(filter(foreign, imports(path))))} == {}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_package_with_a_function_of_its_name(stage: str) -> None:
    function = getattr(import_module(f"qconvert.{stage}"), stage)
    assert inspect.isfunction(function)
    assert inspect.getdoc(function)


def test_the_pipeline_tells_the_story_on_one_screen() -> None:
    source = inspect.getsource(conversion.convert) + inspect.getsource(conversion.finish)
    assert source.count("\n") <= SCREEN_LINES
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    order = [call.id for call in sorted(calls, key=lambda call: call.lineno) if isinstance(call, ast.Name)]
    story = ("calibrate", "quantize", "write", "export", "verify_in_fresh_process")
    assert tuple(name for name in order if name in story) == story


@pytest.mark.parametrize("module", BUILTINS)
def test_a_quantizer_is_one_small_file(module: str) -> None:
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= SMALL_FILE_LINES
