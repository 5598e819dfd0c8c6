"""Verification in a process of its own: what the parent makes of a child that answers, fails or dies."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qconvert.errors import InputError, ResourceError
from qconvert.ir.report import Report, SampleCounts, Size
from qconvert.pipeline import verification, verify_process
from qconvert.pipeline.verify_process import verify_in_fresh_process
from qconvert.recipe import Recipe

REPORT = Report(
    passed=True,
    task="module",
    quantizer="absmax",
    scheme="int8-tensor-a8",
    samples=SampleCounts(calibration=0, evaluation=4),
    size=Size(source_bytes=4000, weights_bytes=1000, graph_bytes=500, ratio=0.25, average_bits=8.0),
)


class Log:
    """Progress as a list."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def stage(self, name: str, total: int | None) -> None:
        self.events.append((name, total))

    def advance(self, n: int = 1) -> None:
        self.events.append(n)


def recipe(**settings: Any) -> Recipe:
    return Recipe.from_settings({"model": "module:mine", "output": "out", **settings})


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a script in the place of the verifying process."""

    def install(script: str) -> None:
        path = tmp_path / "child"
        path.write_text(f"#!{sys.executable} -S\nimport json, os, signal, sys, time\n{script}")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return install


def answer(document: dict[str, Any]) -> str:
    return f"request = json.load(sys.stdin)\nopen(request['result'], 'w').write({json.dumps(document)!r})\n"


def test_the_childs_report_comes_back(child: Any, tmp_path: Path) -> None:
    child(answer({"report": REPORT.model_dump(mode="json")}))
    assert verify_in_fresh_process(recipe(), tmp_path, tmp_path, Log()) == REPORT


def test_the_childs_error_is_raised_as_it_was(child: Any, tmp_path: Path) -> None:
    child(answer({"error": {"class": "InputError", "code": "QC-VERIFY-001", "message": "m", "hint": "h"}}))
    with pytest.raises(InputError) as caught:
        verify_in_fresh_process(recipe(), tmp_path, tmp_path, Log())
    assert (caught.value.code, caught.value.message, caught.value.hint) == ("QC-VERIFY-001", "m", "h")


def test_progress_is_passed_on_and_chatter_goes_to_stderr(
    child: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"stage": "parity", "total": null}', "chatter", "7", '{"stage": "fidelity", "total": 3}', '{"advance": 2}']
    child(f"print({chr(10).join(lines)!r})\n" + answer({"report": REPORT.model_dump(mode="json")}))
    log = Log()
    verify_in_fresh_process(recipe(), tmp_path, tmp_path, log)
    assert log.events == [("parity", None), ("fidelity", 3), 2]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "chatter\n7\n")


def test_a_child_that_is_killed_is_an_error_that_names_the_signal(child: Any, tmp_path: Path) -> None:
    child("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ResourceError, match="ended with code -9 and no answer") as caught:
        verify_in_fresh_process(recipe(), tmp_path, tmp_path, Log())
    assert caught.value.code == "QC-VERIFY-002"
    assert "--no-verify" in caught.value.hint


def test_a_child_that_dies_before_it_has_read_its_request_is_the_same_error(child: Any, tmp_path: Path) -> None:
    child("sys.stdin.close(); os.close(0); sys.exit(3)")
    more_than_a_pipe_holds = {"text": "x" * 1_000_000}
    with pytest.raises(ResourceError, match="ended with code 3 and no answer"):
        verify_in_fresh_process(recipe(options=more_than_a_pipe_holds), tmp_path, tmp_path, Log())


# --- the child ---


def child_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measure: Any) -> dict[str, Any]:
    request = {
        "recipe": recipe(quantizer="awq").model_dump(mode="json"),
        "folder": str(tmp_path),
        "result": str(tmp_path / "result"),
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    monkeypatch.setattr(verification, "measure", measure)
    verify_process.main()
    document: dict[str, Any] = json.loads((tmp_path / "result").read_text())
    return document


def test_the_child_measures_the_folder_by_the_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(folder: Path, given: Recipe, progress: Any) -> Report:
        assert (folder, given) == (tmp_path, recipe(quantizer="awq"))
        progress.stage("parity", None)
        progress.advance(2)
        return REPORT

    assert Report.model_validate(child_answer(monkeypatch, tmp_path, measure)["report"]) == REPORT
    assert capsys.readouterr().out == '{"stage": "verify: parity", "total": null}\n{"advance": 2}\n'


def test_the_child_answers_with_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(folder: Path, given: Recipe, progress: Any) -> Report:
        raise InputError("QC-VERIFY-001", "m", hint="h")

    assert child_answer(monkeypatch, tmp_path, measure) == {
        "error": {"class": "InputError", "code": "QC-VERIFY-001", "message": "m", "hint": "h"}
    }


def test_an_error_of_a_plugins_own_class_comes_back_as_the_class_it_extends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class GgufError(InputError):
        pass

    def measure(folder: Path, given: Recipe, progress: Any) -> Report:
        raise GgufError("QC-GGUF-001", "m", hint="h")

    assert child_answer(monkeypatch, tmp_path, measure)["error"]["class"] == "InputError"


def test_a_bug_is_an_internal_error_not_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(folder: Path, given: Recipe, progress: Any) -> Report:
        raise IndexError("out of range")

    error = child_answer(monkeypatch, tmp_path, measure)["error"]
    assert (error["class"], error["code"]) == ("QConvertError", "QC-INTERNAL-001")
    assert "IndexError: out of range" in error["message"]


def test_a_lack_of_memory_is_told_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(folder: Path, given: Recipe, progress: Any) -> Report:
        raise MemoryError("std::bad_alloc")

    error = child_answer(monkeypatch, tmp_path, measure)["error"]
    assert (error["class"], error["code"]) == ("ResourceError", "QC-MEMORY-001")
    assert error["message"] == "while verifying: not enough memory: std::bad_alloc"
    assert "--no-verify" in error["hint"]


def test_the_child_does_not_outlive_an_interrupted_parent(child: Any, tmp_path: Path) -> None:
    child("print('{\"advance\": 1}', flush=True)\ntime.sleep(60)")

    class Interrupted(Log):
        def advance(self, n: int = 1) -> None:
            raise KeyboardInterrupt

    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        verify_in_fresh_process(recipe(), tmp_path, tmp_path, Interrupted())
    assert time.perf_counter() - begin < 30
