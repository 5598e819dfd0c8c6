"""The side of a process that another one started, and may watch.

Nothing heavy is imported: the process that watches over a command starts with this.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert.supervision.messages import WATCH, Channel

PR_SET_PDEATHSIG = 1  # linux/prctl.h
EXIT_SECONDS = 10  # what threads and exit handlers may take that are left when a command is done

# Threads that plugins have left running, and whose they are: the interpreter would wait for them.
left_running: dict[threading.Thread, str] = {}


_channel: Channel | None = None


def import_path() -> dict[str, str]:
    """Return environment variables that keep a process, and all that it starts, from finding modules in the current folder.

    That folder may be a checkpoint, or hold a script named as a library is. An empty entry of PYTHONPATH means it as well
    (`PYTHONPATH=$PYTHONPATH:/more` leaves one); what the user names stays.
    """
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(named)}


def end_with_parent() -> None:
    """End this process when the one that started it is killed (Linux; elsewhere it runs to its end)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def become_watched() -> None:
    """Prepare this process, before it does anything else, to be watched by another.

    What plugins start is not watched with it, hence not told of it.
    """
    global _channel
    path = os.environ.pop(WATCH, None)
    if path is not None:
        with contextlib.suppress(OSError):  # who watches has gone, or files of other processes are not to be had
            _channel = Channel(Path(path))
            tell_call(None)


def watched_too() -> dict[str, str]:
    """Return environment variables for a process that is watched with this one."""
    return {WATCH: str(_channel.path)} if _channel else {}


def is_watched() -> bool:
    """Return whether another process watches this one."""
    return _channel is not None


def tell_call(call: Mapping[str, Any] | None, seconds: float = 0) -> None:
    """Tell the watching process that a plugin is in this call from now on, which may take so long; or in none."""
    if _channel:
        _channel.tell({"call": call, "until": time.monotonic() + seconds} if call else {"call": None})


def tell_done(code: int) -> None:
    """Tell the watching process that the command is done: its exit code stands, and the process has EXIT_SECONDS to end.

    A call that is told of stays: it was not over when the process of the verification ended.
    """
    if _channel:
        left = [f"thread {thread.name!a} of {whose}" for thread, whose in left_running.items() if thread.is_alive()]
        told = {"exit": code, "left": ", ".join(left)[:1000], "until": time.monotonic() + EXIT_SECONDS}
        _channel.tell({**(_channel.state() or {}), **told})
