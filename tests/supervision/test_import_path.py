"""Code of a checkpoint, of the current folder or of an output never runs: no process looks for modules there."""

from __future__ import annotations

import os
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest
import yaml
from broken_plugins import quantizing
from tiny_models import tiny_bert

from qconvert.supervision.child import import_path

SCRIPT = Path(sys.executable).with_name("qconvert")
# Found by way of PYTHONPATH, it writes down each import path that a process has had.
RECORDER = """
import os, sys

known = set()

def record(event, arguments):
    if event == "import" and tuple(sys.path) not in known:
        known.add(tuple(sys.path))
        with open(os.path.join(os.path.dirname(__file__), f"{os.getpid()}.paths"), "a") as file:
            file.write(f"{sys.path!a}\\n")

sys.addaudithook(record)
"""
# Files of a folder that may not run: modules that qconvert imports, and one that libraries look for.
NAMES = ("click", "flash_attn", "json", "matplotlib", "onnx", "onnxruntime", "pydantic", "torch", "transformers", "yaml")
STARTS_A_PROCESS = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import colorsys'], check=True)"


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    folder = tmp_path / "recorder"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(RECORDER)
    return folder


def poison(folder: Path) -> None:
    """Modules that say so if they are imported, and a distribution that must not be taken for a plugin."""
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the folder ran')\n")
    info = folder / "qconvert_stray-1.0.dist-info"
    info.mkdir(exist_ok=True)  # files of a checkpoint are carried into the output
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qconvert-stray\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qconvert]\nstray = onnx\n")


def run(recorder: Path, folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(recorder), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def processes(recorder: Path) -> list[list[list[str]]]:
    """Of each process its import paths, the first being that which it began with; those of earlier calls are left out."""
    found = []
    for file in recorder.glob("*.paths"):
        found.append([literal_eval(line) for line in file.read_text().splitlines()])
        file.unlink()
    return found


def folders(path: list[str], folder: Path) -> set[Path]:
    """What an import path means in a process whose current folder is `folder`."""
    return {(folder / entry).resolve() for entry in path}


def test_no_process_searches_the_current_folder_the_checkpoint_or_the_output(tmp_path: Path, recorder: Path) -> None:
    checkpoint, out = tiny_bert(tmp_path / "checkpoint"), tmp_path / "out"
    poison(checkpoint)
    (tmp_path / "starts.py").write_text(quantizing("starts", STARTS_A_PROCESS))
    data = {"source": "builtin", "samples": 2, "length": 16}
    recipe = {"model": ".", "output": "../out", "quantizer": "starts", "plugins": ["../starts.py"], "evaluation": data}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    done = run(recorder, checkpoint, SCRIPT, "run", "../recipe.yaml")
    assert (done.returncode, done.stdout) == (0, "../out\n"), done.stderr
    seen = processes(recorder)
    assert len(seen) > 3  # that which watches, the command, its verification, and what the plugin starts
    assert not [path for paths in seen for path in paths if folders(path, checkpoint) & {checkpoint, out}]

    poison(out)
    done = run(recorder, out, SCRIPT, "verify", ".")
    assert (done.returncode, done.stdout) == (0, ".\n"), done.stderr
    seen = processes(recorder)
    assert len(seen) == 3  # and that which loads the artifact, to measure its memory
    assert not [path for paths in seen for path in paths if folders(path, out) & {checkpoint, out}]


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "no.yaml"],
        ["plan", "no.yaml"],
        ["verify", "no", "--gate", "no"],
        ["compare", "no.yaml"],
        ["plugins", "schema", "--plugin", "no"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_neither_does_any_command_that_python_starts_there(tmp_path: Path, recorder: Path, arguments: list[str]) -> None:
    """`python -m` itself searches the current folder until it has found qconvert."""
    folder = tmp_path / "folder"
    folder.mkdir()
    poison(folder)
    done = run(recorder, folder, sys.executable, "-m", "qconvert", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error [QC-"), done.stderr
    seen = processes(recorder)
    assert len(seen) == 2
    assert not [paths for paths in seen if folder in folders(paths[-1], folder)]
    assert len([paths for paths in seen if folder in folders(paths[0], folder)]) == 1  # the recorder sees what Python adds


@pytest.mark.parametrize(
    ("given", "kept"), [(None, ""), ("", ""), (":/more", "/more"), ("/more:", "/more"), ("::.:src", ".:src")]
)
def test_an_empty_entry_of_pythonpath_is_left_out(monkeypatch: pytest.MonkeyPatch, given: str | None, kept: str) -> None:
    if given is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", given.replace(":", os.pathsep))
    assert import_path() == {"PYTHONSAFEPATH": "1", "PYTHONPATH": kept.replace(":", os.pathsep)}
