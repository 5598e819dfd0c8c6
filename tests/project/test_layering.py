"""Who may import whom: the layers of pyproject.toml, from cli down to errors, and the libraries of each room."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from qconvert.pipeline import conversion
from qconvert.plugin.host.manager import BUILTINS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qconvert"
STAGES = ("load", "trace", "plan", "calibrate", "allocate", "quantize", "write", "export", "verify")
STORY = {
    *("prepare", "quantize_blocks", "calibrate", "take", "quantize", "append", "finish", "export", "write_manifest"),
    *("verify_in_fresh_process", "write_report", "publish"),
}
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


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers look at."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from runtime_nodes(node)


def runtime_imports() -> dict[str, set[str]]:
    """Module -> the modules that it imports when it runs, also within functions, and the packages around those."""
    names = (path.relative_to(ROOT).with_suffix("").parts for path in PACKAGE.rglob("*.py"))
    modules = {".".join(parts).removesuffix(".__init__"): ROOT.joinpath(*parts).with_suffix(".py") for parts in names}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found: set[str] = set()
        for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=aliases):
                    found |= {alias.name for alias in aliases}
                case ast.ImportFrom(module=str(source), names=aliases):
                    found |= {source, *(f"{source}.{alias.name}" for alias in aliases)}
        found |= {name.rsplit(".", depth)[0] for name in found for depth in range(1, name.count("."))}
        # A package is there already when a module within it runs.
        graph[module] = {name for name in found & modules.keys() if not f"{module}.".startswith(f"{name}.")}
    return graph


def parts(folder: str) -> dict[str, set[str]]:
    """File -> the parts of qconvert ("ir", "load", ...) that it imports, for all files of a folder."""
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    return {path.relative_to(PACKAGE).as_posix(): {name.split(".")[1] for name in imports(path)} for path in files}


def test_the_contracts_of_import_linter_are_kept() -> None:
    # In a process of its own: import-linter configures logging for all loggers there are.
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_file_imports_itself_through_others() -> None:
    graph = runtime_imports()
    assert len(graph) > 100
    assert "qconvert.job" in graph["qconvert.quantize"]
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def contracts() -> list[dict[str, Any]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = settings["tool"]["importlinter"]["contracts"]
    return found


def test_the_contracts_give_each_library_its_rooms() -> None:
    rooms = {
        library: {line.partition(" ")[0].removesuffix(".**") for line in contract["ignore_imports"]}
        for contract in contracts()
        if contract["type"] == "forbidden" and contract["source_modules"] == ["qconvert"]
        for library in contract["forbidden_modules"][:1]
    }
    assert {library: {name.removeprefix("qconvert.") for name in names} for library, names in rooms.items()} == {
        "onnxruntime": {"ort"},
        "onnx_ir": {"graph", "ort", "trace", "export", "verify", "ir.template", "plan.targets", "write.origin"},
        "transformers": {"execution", "load", "trace", "calibrate.layers", "training.layers", "verify.loaders"},
    }
    (torch,) = (contract["source_modules"] for contract in contracts() if contract.get("forbidden_modules") == ["torch"])
    assert {"qconvert.graph", "qconvert.recipe", "qconvert.report", "qconvert.cli"} <= set(torch)


def test_the_contract_names_every_stage_and_keeps_the_stages_apart() -> None:
    (stages,) = (layer for layer in contracts()[0]["layers"] if "calibrate" in layer)
    assert set(stages.split(" | ")) == {*STAGES, "quantizers", "tuners", "range_estimators", "training", "report"}


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_another_stage(stage: str) -> None:
    others = set(STAGES) - {stage}
    assert {file: used & others for file, used in parts(stage).items() if used & others} == {}


def test_the_records_import_nothing_above_them() -> None:
    allowed = {"ir", "errors", "vocabulary"}
    assert {file: used - allowed for file, used in parts("ir").items() if used - allowed} == {}


def test_the_plugin_side_imports_records_and_recipe_only() -> None:
    allowed = {"plugin", "recipe", "ir", "errors"}
    found = {file: used - allowed for file, used in parts("plugin").items() if used - allowed}
    assert found.pop("plugin/__init__.py") == {"load"}  # the door, which hands out what loaders need
    hosts = {file for file in found if file.startswith("plugin/host/")}  # where plugins are found and called
    assert {file: used for file, used in found.items() if file not in hosts} == {}
    assert set().union(*found.values()) <= {"supervision", "vocabulary"}


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


def without_docstring(code: ast.Module) -> ast.Module:
    (function,) = code.body
    assert isinstance(function, ast.FunctionDef)
    assert ast.get_docstring(function)
    del function.body[0]
    return code


def called(code: ast.Module) -> list[str]:
    """The names of what is called, inner calls first."""
    found = [node for node in ast.walk(code) if isinstance(node, ast.Call)]
    found.sort(key=lambda call: (call.end_lineno, call.end_col_offset))
    return [call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func) for call in found]


def test_the_pipeline_tells_the_story_on_one_screen() -> None:
    """What a run does, in the order in which it does it: from a recipe to a block, and from the blocks to a folder."""
    told = (conversion.convert, conversion.quantize_blocks, conversion.Conversion.take, conversion.Conversion.finish)
    codes = [ast.parse(dedent(inspect.getsource(function))) for function in told]
    assert sum(ast.unparse(without_docstring(code)).count("\n") + 1 for code in codes) <= SCREEN_LINES
    assert [[name for name in called(code) if name in STORY] for code in codes] == [
        ["prepare", "quantize_blocks", "finish", "publish"],
        ["calibrate", "take"],
        ["quantize", "append"],
        ["finish", "export", "write_manifest", "verify_in_fresh_process", "write_report"],
    ]


@pytest.mark.parametrize("module", BUILTINS)
def test_a_quantizer_is_one_small_file(module: str) -> None:
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= SMALL_FILE_LINES
