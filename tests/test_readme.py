"""README.md: what it promises a newcomer holds."""

from __future__ import annotations

import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from qconvert import Recipe, errors
from qconvert.cli import COMMANDS
from qconvert.cli.exits import GATE_MISSED, INTERNAL, INTERRUPTED
from qconvert.errors import QConvertError
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.host.manager import BUILTINS, plugin_manager
from qconvert.recipe.file import read_recipe
from qconvert.report import card
from qconvert.trace.capture import OPSET

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SET_UP = [block for block in SHELL if "pip" in block or "-m venv" in block]


def first_cells(header: str) -> list[str]:
    """The first cell of every row of the table that begins with `header`."""
    rows = README.partition(f"| {header} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [row.split("|")[1].strip() for row in rows]


# --- set-up ---


def test_exactly_two_commands_of_one_line_do_all_set_up() -> None:
    assert len(SET_UP) == 2
    assert all(block.count("\n") == 1 for block in SET_UP)


@pytest.mark.parametrize("command", SET_UP, ids=["quickstart", "tests"])
def test_a_set_up_command_works_by_itself_with_the_tested_versions(command: str) -> None:
    make, install, run = command.strip().split(" && ")
    assert make == "python3 -m venv .venv"
    assert install.startswith(".venv/bin/pip install -c constraints.txt ")
    assert run.startswith(".venv/bin/")
    files = [word for word in shlex.split(command) if "." in word and not word.startswith(".venv")]
    assert "constraints.txt" in files
    assert [word for word in files if not (ROOT / word.partition("[")[0]).exists()] == []


def test_the_first_converts_the_quickstart_and_the_second_runs_the_tests() -> None:
    assert [block.rstrip().rpartition(" && ")[2] for block in SET_UP] == [
        ".venv/bin/qconvert run examples/quickstart.yaml",
        ".venv/bin/pytest",
    ]


def test_the_quickstart_is_a_valid_recipe_that_can_be_run_again() -> None:
    recipe = Recipe.from_settings(read_recipe(ROOT / "examples" / "quickstart.yaml"))
    assert recipe.model.startswith("pkg:")
    assert (recipe.quantizer, str(recipe.scheme)) == ("per-channel", "int8-channel-a8")
    assert recipe.output == Path("out/minilm")
    assert recipe.force
    assert recipe.verify


# --- what it says ---


def test_every_path_that_it_names_exists() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    run = re.findall(r"examples/\S+", "".join(SHELL))
    assert linked
    assert run
    assert [path for path in [*linked, *run] if not (ROOT / path).exists()] == []


def test_it_lists_every_command() -> None:
    assert [cell.strip("`").split()[1] for cell in first_cells("command | does")] == list(COMMANDS)


def test_it_lists_every_exit_code() -> None:
    raised = {kind.exit_code for kind in QConvertError.__subclasses__()}
    assert set(map(int, first_cells("exit code | meaning"))) == {0, GATE_MISSED, INTERNAL, INTERRUPTED} | raised
    assert errors.QConvertError.exit_code == INTERNAL


def test_it_lists_every_built_in_quantizer_with_its_default_scheme() -> None:
    table = README.partition("| quantizer | default scheme |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [name for name, *_ in rows] == [module.rpartition(".")[2].replace("_", "-") for module in BUILTINS]
    for name, scheme, _ in rows:
        assert plugin_manager().quantizer(name, {}).default_scheme == QuantScheme.parse(scheme)


def test_the_versions_of_other_tools_are_those_that_qconvert_is_tested_with() -> None:
    wanted = " ".join(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"])
    (runtime,) = re.findall(r"onnxruntime>=([\d.]+)", wanted)
    (transformers,) = re.findall(r"transformers>=([\d.]+)", wanted)
    assert f"onnxruntime ({runtime} or newer; only newer than 1.22 read the graphs' opset {OPSET} at all)" in README
    assert f"transformers ({transformers} or newer, with compressed-tensors)" in README
    assert f"`pip install 'transformers>={transformers}' compressed-tensors`" in inspect.getsource(card)


def test_its_python_is_valid() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
