"""Broken plugins: each is reported with its distribution, version, place and fault, and takes nothing else with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broken_plugins import FAILING, PRINTING, RUDE, UNUSABLE, install

FACTORY = """
import torch

def factory():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)), (torch.randn(64, 32),)
"""


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(FACTORY)
    folder = tmp_path / "plugins"
    folder.mkdir()
    return folder


def command(folder: Path, *arguments: str) -> list[str]:
    model = ["--model", f"module:{folder.parent / 'model.py'}:factory", "--output", str(folder.parent / "out")]
    return [sys.executable, "-m", "qconvert", "run", *model, "--layout", "onnx", "--json", *arguments]


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **more}


def run(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(folder, *arguments), env=environment(folder, **more), capture_output=True, text=True, timeout=300
    )
    assert "Traceback" not in done.stderr
    return done


def test_a_built_in_quantizer_works_beside_all_of_them(plugins: Path) -> None:
    for name, (source, *_) in {**UNUSABLE, **FAILING}.items():
        install(plugins, name, source)
    install(plugins, "prints", PRINTING)
    done = run(plugins, "--quantizer", "absmax")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
    for name, (_, reason, line) in UNUSABLE.items():
        # Those that were told of before one crashed are told of again when the command begins again.
        warning, *_ = [text for text in done.stderr.splitlines() if f"plugin qconvert-{name} 0.3 " in text]
        assert f"(qconvert_{name})" in warning
        assert reason in warning
        assert f"qconvert_{name}.py:{line or ''}" in warning or not line


@pytest.mark.parametrize("name", ["absent", "taken", "dies"])
def test_a_recipe_that_needs_an_unusable_one_fails_with_4(plugins: Path, name: str) -> None:
    source, reason, _ = UNUSABLE[name]
    install(plugins, name, source)
    done = run(plugins, "--quantizer", "theirs")
    assert done.returncode == 4
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "QC-PLUGIN-001"
    assert f"qconvert-{name} 0.3" in error["message"]
    assert reason in error["message"]


@pytest.mark.parametrize("name", FAILING)
def test_one_that_fails_is_named_with_its_version_and_the_layer(plugins: Path, name: str) -> None:
    source, code, reason = FAILING[name]
    install(plugins, name, source)
    done = run(plugins, "--quantizer", name, "--plugin-timeout", "10" if name == "hangs" else "60")
    assert done.returncode == (6 if code == "QC-MEMORY-001" else 4), done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["code"] == code
    assert f"qconvert-{name} 0.3" in error["message"]
    assert reason in error["message"]
    assert "'0'" in error["message"]  # the layer
    assert not (plugins.parent / "out").exists()


def test_what_one_prints_is_not_on_stdout(plugins: Path) -> None:
    install(plugins, "prints", PRINTING)
    done = run(plugins, "--quantizer", "prints")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["quantizer"] == "prints"
    assert "hello" in done.stderr


def test_what_one_does_to_the_process_reaches_nobody_else(plugins: Path) -> None:
    install(plugins, "rude", RUDE)
    umask = os.umask(0o027)
    try:
        done = run(plugins, "--quantizer", "rude")
    finally:
        os.umask(umask)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
    out = plugins.parent / "out"
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    assert out.stat().st_mode & 0o777 == 0o750
    assert (
        "plugin qconvert-rude 0.3 changed what belongs to the whole process, and is put back: the recursion limit"
        in done.stderr
    )
    assert "from a process" in done.stderr
    assert "warning: thread 'poll' of plugin qconvert-rude 0.3 ran on for 10 seconds after the command was done" in done.stderr


def test_watching_changes_no_byte(plugins: Path) -> None:
    install(plugins, "prints", PRINTING)
    files = {}
    for debug in ("", "1"):  # the command itself, unwatched
        assert (
            run(
                plugins, "--quantizer", "prints", "--force", "--no-verify", **({"QCONVERT_DEBUG": debug} if debug else {})
            ).returncode
            == 0
        )
        out = plugins.parent / "out"
        files[debug] = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in ("report.json", "README.md")}
    assert files[""] == files["1"]


def test_plugins_can_be_restricted(plugins: Path) -> None:
    install(plugins, "absent", UNUSABLE["absent"][0])
    install(plugins, "prints", PRINTING)
    none = run(plugins, "--quantizer", "prints", QCONVERT_PLUGINS="")
    assert (none.returncode, json.loads(none.stdout)["error"]["code"]) == (2, "QC-PLUGIN-002")
    one = run(plugins, "--quantizer", "prints", "--no-verify", QCONVERT_PLUGINS="QConvert_Prints")
    assert one.returncode == 0
    assert "qconvert-absent" not in one.stderr
    missing = run(plugins, "--quantizer", "theirs", "--force", QCONVERT_PLUGINS="qconvert-theirs")
    assert missing.returncode == 4
    assert "QCONVERT_PLUGINS names it, but it is not installed" in missing.stdout


def test_a_plugin_in_a_file_is_tried_without_being_installed(plugins: Path) -> None:
    file = plugins / "trial.py"
    file.write_text(PRINTING)
    done = run(plugins, "--plugin", str(file), "--quantizer", "prints", "--no-verify")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((plugins.parent / "out" / "qconvert.json").read_text())
    assert manifest["recipe"]["plugins"] == [os.path.relpath(file, plugins.parent / "out")]
    assert manifest["versions"]["trial.py"].startswith("sha256:")
    again = subprocess.run(
        [sys.executable, "-m", "qconvert", "verify", str(plugins.parent / "out")], cwd="/", capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    absent = run(plugins, "--plugin", str(plugins / "nothing.py"))
    assert (absent.returncode, json.loads(absent.stdout)["error"]["code"]) == (2, "QC-PLUGIN-009")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Processes of a shell's background job ignore SIGINT, and so would those that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.usefixtures("interruptible", "python_itself")
def test_signals_reach_the_command_and_nothing_runs_on(plugins: Path, number: signal.Signals) -> None:
    install(plugins, "hangs", FAILING["hangs"][0])
    watching = subprocess.Popen(
        command(plugins, "--quantizer", "hangs"), env=environment(plugins), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert watching.stderr is not None
    assert any(b"quantize" in line for line in watching.stderr)
    time.sleep(1)
    watched = Path(f"/proc/{watching.pid}/task/{watching.pid}/children").read_text().split()
    assert len(watched) == 1
    watching.send_signal(number)
    assert watching.wait(30) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    deadline = time.monotonic() + 10
    while Path(f"/proc/{watched[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{watched[0]}").exists()
