"""stdout: the result of a command, and nothing else."""

from __future__ import annotations

import os
import sys


def emit(text: str) -> None:
    """Print the result. A reader that has gone (`qconvert plan | head`) does not change the verdict, which is the exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends; that must have somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
