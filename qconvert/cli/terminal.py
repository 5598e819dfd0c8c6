"""stderr: progress, warnings and tables for the person who waits."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from qconvert.errors import printable


class StderrConsole(Console):
    """A console on stderr. A reader that has gone is no reason to stop, nor to exit with 1 as rich would."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        self.quiet = True


class TerminalProgress:
    """One bar per stage on a terminal, one line per stage elsewhere (logs of build machines)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=True,
        )
        self._task: TaskID | None = None

    def stage(self, name: str, total: int | None) -> None:
        """Show a new bar of `total` steps on a terminal, a line elsewhere. total: None if it isn't known."""
        if not self._console.is_terminal:
            self._console.print(Text(f"qconvert: {name}"), soft_wrap=True)
            return
        self._end_stage()
        self._bars.start()
        self._task = self._bars.add_task(name, total=total)

    def advance(self, n: int = 1) -> None:
        """Move the bar on by `n` steps."""
        if self._task is not None:
            self._bars.advance(self._task, n)

    def close(self) -> None:
        """Leave the terminal as it was, the last bar standing."""
        self._end_stage()
        if self._bars.tasks:  # stopping what never began would print an empty line
            self._bars.stop()

    def _end_stage(self) -> None:
        if self._task is not None:
            task = next(each for each in self._bars.tasks if each.id == self._task)
            self._bars.update(self._task, total=task.total or task.completed or 1, completed=task.total or task.completed or 1)
            self._bars.stop_task(self._task)
            self._task = None


class _Warnings(logging.Handler):
    """qconvert's own warnings, one paragraph each, above any bar; with QCONVERT_DEBUG=1 all that it logs, with tracebacks."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.DEBUG if os.environ.get("QCONVERT_DEBUG") else logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        title = f"{record.levelname.lower()}: "
        lines = map(printable, self.format(record).split("\n"))  # several where it ends in a traceback
        self._console.print(Text.assemble((title, "yellow"), "\n".join(lines)), soft_wrap=True)


@contextmanager
def working(console: Console) -> Iterator[TerminalProgress]:
    """Show progress and qconvert's own warnings while a command works, and hide what libraries say.

    What anything prints to stdout goes to stderr, so that stdout holds the result alone.
    """
    # Read when these libraries are imported, which is after this. "-all": torch's own handlers start at errors.
    os.environ.setdefault("TORCH_LOGS", "-all")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # How often threads that wait for each other look before they sleep. By default they spin for milliseconds: on a machine
    # with other work, twice the processor time; without any spinning, quantizing takes a third longer (both measured).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    handler, logger, progress = _Warnings(console), logging.getLogger("qconvert"), TerminalProgress(console)
    level = logger.level
    logger.setLevel(handler.level)
    logger.addHandler(handler)
    silence = logging.NullHandler()  # without any handler, Python prints the libraries' warnings itself
    logging.getLogger().addHandler(silence)
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield progress
            finally:
                progress.close()  # while stdout is still redirected: bars give back the stdout that they found
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        logging.getLogger().removeHandler(silence)
