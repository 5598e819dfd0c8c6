"""Traced templates on disk: a model whose configuration was traced before is not traced again, and comes out the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_models import save_tensors, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

import qconvert
from qconvert.errors import InputError
from qconvert.load.hugging_face import load_folder
from qconvert.storage import cache as storage
from qconvert.trace import trace

# The manifest tells the folder of the source; report and card hold timings.
OWN = ("qconvert.json", "report.json", "README.md")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where templates are kept, empty at first."""
    monkeypatch.setenv("QCONVERT_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "templates"


def converted(model: Path | str, output: Path, **settings: object) -> dict[str, bytes]:
    """The files of a conversion, but for those that tell where and when it was."""
    chosen = {"quantizer": "absmax", "scheme": "int4-g32", "layout": "onnx", "verify": False, **settings}
    qconvert.convert(qconvert.Recipe.from_settings({"model": str(model), "output": str(output), **chosen}))
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file() and path.name not in OWN}


def refuse_to_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was traced")

    monkeypatch.setattr("torch.export.export", fail)


def trim(model: Path) -> None:
    """Another configuration that computes the same on short texts."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 200}))


@pytest.mark.parametrize("save", [tiny_llama, tiny_gpt2, tiny_bert, tiny_t5])
def test_a_second_conversion_is_not_traced_and_writes_the_same_bytes(
    save: Callable[[Path], Path], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setenv("QCONVERT_CACHE", "")
        without = converted(model, tmp_path / "without")
    assert not kept.exists()
    first = converted(model, tmp_path / "first")
    refuse_to_trace(monkeypatch)
    assert without == first == converted(model, tmp_path / "second")


def test_a_second_command_does_not_import_the_exporter(kept: Path, tmp_path: Path) -> None:
    """It runs in a process that qconvert starts: the environment reaches that one too."""
    model = tiny_llama(tmp_path / "model")
    for number, imported in enumerate((True, False)):
        command = [sys.executable, "-m", "qconvert", "run", "--model", str(model), "--no-verify"]
        command += ["--quantizer", "absmax", "--output", str(tmp_path / f"output{number}")]
        environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert ("onnxscript" in modules) is imported


def test_other_weights_of_the_same_configuration_are_checked_but_not_traced(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form that was right for one checkpoint may be wrong for another."""
    model = tiny_llama(tmp_path / "model")
    converted(model, tmp_path / "first")
    tensors = load_file(model / "model.safetensors")
    save_tensors({name: tensor * 1.5 for name, tensor in tensors.items()}, model)
    checks = []
    check = sys.modules["qconvert.trace"].relative_error

    def counted(*arguments: object) -> float:
        checks.append(arguments)
        return float(check(*arguments))

    monkeypatch.setattr("qconvert.trace.relative_error", counted)
    refuse_to_trace(monkeypatch)
    converted(model, tmp_path / "second")
    converted(model, tmp_path / "third")
    assert len(checks) == 1


def test_another_configuration_is_traced(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(tmp_path / "model")
    converted(model, tmp_path / "first")
    trim(model)
    refuse_to_trace(monkeypatch)
    with pytest.raises(InputError, match="it was traced"):
        converted(model, tmp_path / "second")


def test_other_code_or_versions_trace_anew(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert(tmp_path / "model")
    converted(model, tmp_path / "first")
    refuse_to_trace(monkeypatch)
    for place, value in (("code_digest", lambda _: "other"), ("_versions", lambda: {"torch": "9"})):
        with monkeypatch.context() as patch:
            patch.setattr(f"qconvert.trace.cache.{place}", value)
            with pytest.raises(InputError, match="it was traced"):
                converted(model, tmp_path / "second")


@pytest.mark.parametrize("damage", ["empty", "truncated", "changed"])
def test_a_damaged_entry_is_traced_anew_and_replaced(
    damage: str, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_bert(tmp_path / "model")
    first = converted(model, tmp_path / "first")
    for path in kept.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        damages: dict[str, bytes] = {"empty": b"", "truncated": bytes(content[:-20]), "changed": bytes(content)}
        path.write_bytes(damages[damage])
    assert converted(model, tmp_path / "second") == first
    refuse_to_trace(monkeypatch)
    assert converted(model, tmp_path / "third") == first


def test_a_folder_that_can_not_be_written_is_no_error(kept: Path, tmp_path: Path) -> None:
    kept.parent.mkdir()
    kept.write_text("a file in its place")
    assert converted(tiny_bert(tmp_path / "model"), tmp_path / "output")
    assert kept.read_text() == "a file in its place"


def test_two_processes_at_once_each_write_the_same_and_leave_whole_entries(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_bert(tmp_path / "model")
    command = [sys.executable, "-m", "qconvert", "run", "--model", str(model), "--quantizer", "absmax", "--no-verify"]
    started = [
        subprocess.Popen([*command, "--layout", "onnx", "--scheme", "int4-g32", "--output", str(tmp_path / name)])
        for name in ("one", "other")
    ]
    assert [process.wait() for process in started] == [0, 0]
    assert len(list(kept.iterdir())) == 2  # a capture, and for which weights it is right
    refuse_to_trace(monkeypatch)
    third = converted(model, tmp_path / "third")
    for name in ("one", "other"):
        assert {file: (tmp_path / name / file).read_bytes() for file in third} == third


def test_what_was_not_used_for_longest_goes_first(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_BYTES", 3000)
    cache = storage.Cache("templates")
    for age, key in ((30, "a"), (20, "b")):
        cache.put(key, {"part": bytes(1000)})
        os.utime(kept / key, (0, 1e9 - age))
    assert cache.get("a") == {"part": bytes(1000)}
    cache.put("c", {"part": bytes(1000)})
    assert sorted(path.name for path in kept.iterdir()) == ["a", "c"]
    cache.put("d", {"part": bytes(4000)})
    assert sorted(path.name for path in kept.iterdir()) == ["a", "c"]


def test_the_users_folder_is_the_one_of_the_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QCONVERT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.cache_folder("templates") == tmp_path / "qconvert" / "templates"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.cache_folder("templates") == tmp_path / "home" / ".cache" / "qconvert" / "templates"


FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), {"input": torch.randn(16, 8)}
"""


def test_a_factorys_module_is_always_traced(kept: Path, tmp_path: Path) -> None:
    """Its code may lie anywhere, and hold what no key tells."""
    code = tmp_path / "factory.py"
    code.write_text(FACTORY)
    converted(f"module:{code}:build", tmp_path / "output")
    assert not kept.exists()


def test_a_module_that_something_was_hung_into_is_always_traced(kept: Path, tmp_path: Path) -> None:
    model = load_folder(tiny_bert(tmp_path / "model"))
    model.module.register_forward_hook(lambda module, args, output: output)
    trace(model)
    assert not kept.exists()
