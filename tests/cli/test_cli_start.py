"""Start-up is designed: help, errors in flags and the version come without the heavy libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from broken_plugins import install

HEAVY = {"torch", "transformers", "pydantic", "pluggy", "onnx", "onnxruntime", "rich", "yaml", "matplotlib"}


def heavy_modules_after(code: str) -> set[str]:
    script = f"import json, sys\ntry:\n    {code}\nexcept SystemExit: pass\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["plan", "--help"],
        ["verify", "--help"],
        ["compare", "--help"],
        ["plugins", "--help"],
        ["run", "--oops"],
    ],
)
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    assert heavy_modules_after(f"from qconvert.cli import main; main({arguments!r})") == set()


def test_importing_qconvert_and_its_version_imports_nothing_heavy() -> None:
    assert heavy_modules_after("import qconvert; qconvert.__version__; dir(qconvert)") == set()


def test_a_recipe_needs_no_torch() -> None:
    assert "torch" not in heavy_modules_after("from qconvert import Recipe, Report, hookimpl")


def test_a_run_needs_no_matplotlib() -> None:
    assert "matplotlib" not in heavy_modules_after("import qconvert.pipeline.conversion, qconvert.cli.run, qconvert.cli.plan")


def test_the_plugin_manager_needs_no_torch_until_a_quantizer_is_asked_for() -> None:
    """What plugins import is theirs: a loader can wait, a quantizer is made of it."""
    ask = "import os; os.environ['QCONVERT_PLUGINS'] = 'qconvert-gguf,qconvert-mlflow'; "
    assert "torch" not in heavy_modules_after(f"{ask}from qconvert.plugin.host.manager import PluginManager; PluginManager(())")


def test_the_public_names_are_the_documented_ones() -> None:
    import qconvert

    assert sorted(qconvert.__all__) == ["Recipe", "Report", "__version__", "convert", "hookimpl", "prepare_qat", "save_trained"]
    assert set(qconvert.__all__) <= set(dir(qconvert))
    assert qconvert.Recipe.__module__ == "qconvert.recipe"
    with pytest.raises(AttributeError, match="no attribute 'recepie'"):
        qconvert.recepie  # noqa: B018


def test_help_answers_at_once_and_lists_every_command(tmp_path: Path) -> None:
    """With twenty plugins installed, none of which is imported."""
    for number in range(20):
        install(tmp_path, f"dies{number}", "import os\nos.abort()")
    command = [sys.executable, "-m", "qconvert", "--help"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    seconds = []
    for _ in range(3):  # processor time, the best of three: other work on the machine is not our start-up
        before = os.times()
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.3
    commands = [line.split()[0] for line in done.stdout.partition("Commands:\n")[2].splitlines()]
    assert commands == ["run", "plan", "verify", "compare", "plugins"]
    assert "qconvert [OPTIONS]" in done.stdout  # not "python -m" or "__main__.py"
