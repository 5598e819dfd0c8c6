"""docs/architecture.md and docs/extending.md: every file and every name in them exists, names in the file that is linked."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

from qconvert.errors import QConvertError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ("architecture.md", "extending.md")
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")
EXTENDING = (DOCS / "extending.md").read_text(encoding="utf-8")
# What the guide adds: files and names that are there once it has been followed.
ADDED = "".join(re.findall(r"^```diff\n.*?^```", EXTENDING, re.MULTILINE | re.DOTALL))
NEW_FILES = ("qconvert/targets/mobile.py", "npz_loader.py")
# The words of others: files of artifacts and sources, names of operators, tensors, modules and settings.
FOREIGN = {
    *("MatMulNBits", "MatMulIntegerToFloat", "GatherBlockQuantized", "gate_proj", "weight_shape"),
    *("weight_packed", "weight_scale", "weight_zero_point"),
}
FILES = (".py", ".md", ".json", ".toml", ".onnx", ".bin", ".safetensors", ".npz", ".txt")


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@cache
def names_of(path: Path) -> frozenset[str]:
    """What a module defines: functions, classes, constants, and "Class.member"; not what it imports."""
    found: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    found.add(prefix + name)
                    if isinstance(node, ast.ClassDef):
                        collect(node.body, f"{prefix}{name}.")
                case ast.Assign(targets=targets):
                    names = (each for target in targets for each in ast.walk(target))
                    found.update(prefix + name.id for name in names if isinstance(name, ast.Name))
                case ast.AnnAssign(target=ast.Name(id=name)):
                    found.add(prefix + name)

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def defines(path: Path, name: str) -> bool:
    """Whether a file is called so, or has the name; "module.name" for a name of "module.py" is the same."""
    module = path.parent.name if path.stem == "__init__" else path.stem
    return name == module or bool({name, name.removeprefix(f"{module}.")} & names_of(path))


@pytest.mark.parametrize("page", PAGES)
def test_every_name_is_defined_in_the_file_that_it_links_to(page: str) -> None:
    links = re.findall(r"\[`([^`]+)`\]\(\.\./([^)#]+\.py)\)", prose(page))
    wrong = [f"{name} in {file}" for name, file in links if not (ROOT / file).is_file() or not defines(ROOT / file, name)]
    assert wrong == []


def test_the_map_links_to_names() -> None:
    assert len(re.findall(r"\[`[^`]+`\]\(\.\./qconvert/", ARCHITECTURE)) > 100


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str) -> None:
    paths = re.findall(r"`((?:qconvert|tests|docs|examples|plugins)/[\w./]*)`", prose(page))
    assert paths
    assert [path for path in paths if path not in NEW_FILES and not (ROOT / path).exists()] == []
    files = re.findall(r"`(\w+\.py)`", prose(page))  # without a folder, where a line has named it
    known = {path.name for path in (ROOT / "qconvert").rglob("*.py")}
    assert [name for name in files if name not in known and name not in NEW_FILES] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_other_name_occurs_in_the_code(page: str) -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "qconvert").rglob("*.py"))) + ADDED
    words = set(re.findall(r"\w+", code)) | FOREIGN
    spans = re.findall(r"(?<!\[)`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`", prose(page))
    names = [span for span in spans if not span.endswith(FILES)]
    assert names
    assert [name for name in names if not set(name.split(".")) <= words] == []


def test_every_room_is_on_the_map() -> None:
    rooms = {path.name for path in (ROOT / "qconvert").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    table = ARCHITECTURE.partition("### The rooms")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `qconvert/(\w+)/` \|", table, re.MULTILINE)) == rooms


def test_the_stack_is_that_of_the_contract() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    drawn = ARCHITECTURE.partition("## The stack")[2].split("```")[1].strip().splitlines()
    assert [line.split("   ")[0].strip() for line in drawn] == settings["contracts"][0]["layers"]


def test_the_libraries_are_where_the_contracts_allow_them() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    rows = {row.split("|")[1].strip(): row for row in ARCHITECTURE.splitlines() if row.startswith("| ")}
    for contract in settings["contracts"][1:]:
        library = contract["forbidden_modules"][0]
        if library not in rows:
            continue
        pairs = (each.split(" -> ") for each in contract.get("ignore_imports", ()))
        allowed = {module for module, imported in pairs if imported == library}
        allowed |= set(contract["source_modules"]) - {"qconvert"}
        named = {
            path.strip("/").removesuffix(".py").replace("/", ".") for path in re.findall(r"`(qconvert/[\w./]+)`", rows[library])
        }
        assert named == {module.removesuffix(".**") for module in allowed}


def test_every_exit_code_is_that_of_its_class() -> None:
    rows = re.findall(r"^\| (\d+) \| \[`(\w+)`\]", ARCHITECTURE, re.MULTILINE)
    classes: list[type[QConvertError]] = [QConvertError, *QConvertError.__subclasses__()]
    kinds = {kind.__name__: kind.exit_code for kind in classes}
    assert {name: int(code) for code, name in rows} == kinds
