"""stdout: the result of a command, and nothing else."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

PIPE_WIDTH = 200  # columns for grep, sed and files, where folded names would be in the way


def emit(text: str) -> None:
    """Print the result. A reader that has gone (`qconvert plan | head`) does not change the verdict, which is the exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends; that must have somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def emit_table(table: RenderableType) -> None:
    """Print a result that is a table."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    with console.capture() as capture:  # so that `| head` is met in one place, `emit`
        console.print(table)
    emit(capture.get().rstrip("\n"))
