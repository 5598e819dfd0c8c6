"""What a person sees while a command works: bars on a terminal, lines in a log."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from qconvert.cli.terminal import StderrConsole, TerminalProgress, working
from qconvert.ir.progress import Progress, silent


def shown(*, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
    progress = TerminalProgress(console)
    progress.stage("quantize", 30)
    progress.advance(10)
    progress.advance()
    progress.stage("export", None)
    progress.close()
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_without_a_terminal_each_stage_is_one_line() -> None:
    assert shown(terminal=False) == "qconvert: quantize\nqconvert: export\n"


def test_on_a_terminal_each_stage_is_a_bar_that_ends_full() -> None:
    last_frame = shown(terminal=True).replace("\x1b[2K", "").split("\x1b[1A")[-1]
    assert "quantize" in last_frame
    assert "30/30" in last_frame
    assert "export" in last_frame


def test_nothing_is_drawn_where_nothing_was_begun() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    TerminalProgress(console).close()
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_the_library_default_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    progress: Progress = silent
    progress.stage("quantize", 30)
    progress.advance(3)
    assert capfd.readouterr() == ("", "")


def test_a_closed_stderr_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Gone())
    console = StderrConsole()
    console.print("first")
    console.print("second")
    assert console.quiet


def test_working_leaves_stdout_as_it_was_after_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    stdout = sys.stdout
    with working(StderrConsole()) as progress:
        progress.stage("quantize", 2)
        assert sys.stdout is not stdout
    assert sys.stdout is stdout


def test_working_leaves_logging_as_it_was() -> None:
    before = [list(logging.getLogger(name).handlers) for name in (None, "qconvert")]
    with working(StderrConsole()):
        assert [list(logging.getLogger(name).handlers) for name in (None, "qconvert")] != before
    assert [list(logging.getLogger(name).handlers) for name in (None, "qconvert")] == before


def test_debug_shows_what_qconvert_logs_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCONVERT_DEBUG", "1")
    console = Console(file=io.StringIO(), width=80)
    with working(console):
        try:
            raise ValueError("first cause")
        except ValueError:
            logging.getLogger("qconvert").debug("can't be traced", exc_info=True)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.startswith("debug: can't be traced")
    assert "ValueError: first cause" in shown
