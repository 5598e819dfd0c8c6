"""Every command runs in a process of its own, which this one watches, because plugins are foreign code.

The command's process says which call of which plugin it is in (plugin/watch.py). If that takes longer than it may, the process
is ended; if the process dies, it is known of what. Either way the output folder is what it was, what was quantized is kept for
the next run, the terminal is usable, and the error names the plugin. A plugin that can't even be imported is set aside, and
the command begins again without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qconvert.errors import PluginError, QConvertError, ResourceError
from qconvert.ir.process import SET_ASIDE, WATCH, end_with_parent

# Calls of every plugin there is, whatever the command: one that dies in them is left out.
WITHOUT_IT = ("import", "register_quantizers")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_SECONDS = 1.0
SHOW_CURSOR = "\x1b[?25h"  # ECMA-48 DECTCEM: progress bars hide it


@dataclass(frozen=True, slots=True)
class Ending:
    """How the command's process ended: its exit code, negative for a signal, and the plugin's call that it died in.

    timed_out: it was ended because that call took too long.
    signals: what this process was sent meanwhile, and passed on.
    """

    code: int
    call: Mapping[str, Any]
    timed_out: bool
    signals: Sequence[int]

    @property
    def how(self) -> str:
        if self.timed_out:
            return f"was ended after {self.call['seconds']:g} seconds"
        return f"crashed with {signal.Signals(-self.code).name}" if self.code < 0 else f"exited with code {self.code}"


def is_needed(arguments: Sequence[str]) -> bool:
    """Not for help, not in the process that is watched, not where a debugger is to see the command."""
    asks = not arguments or any(argument in ("--help", "--version") for argument in arguments)
    return os.name == "posix" and not asks and WATCH not in os.environ and "QCONVERT_DEBUG" not in os.environ


def become_watched() -> None:
    """What the command's process does first. It is no process of the terminal's foreground, but may write to it."""
    if WATCH in os.environ:
        end_with_parent()
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)


def run(arguments: Sequence[str]) -> int:
    """Run the command and give its exit code.

    Raises PluginError QC-PLUGIN-010 if it died in a plugin, QC-PLUGIN-011 if a plugin took too long; ResourceError
    QC-MEMORY-002 if the system ended it, and QConvertError QC-INTERNAL-002 if it crashed by itself.
    """
    set_aside: list[tuple[str, str, str, str]] = []
    while True:
        ending = _watch(arguments, set_aside)
        if ending.code >= 0 and not ending.call:
            return ending.code
        _restore_terminal()
        if ending.signals:
            return 128 + ending.signals[0]
        verb, _, value = str(ending.call.get("call", "")).partition(" ")
        if verb not in WITHOUT_IT:
            raise _error(ending)
        set_aside.append((ending.call["plugin"], ending.call["version"], value, f"its {verb} {ending.how}"))


def _watch(arguments: Sequence[str], set_aside: list[tuple[str, str, str, str]]) -> Ending:
    reading, writing = os.pipe()
    environment = {**os.environ, WATCH: str(writing), SET_ASIDE: json.dumps(set_aside)}
    command = [sys.executable, "-m", "qconvert", *arguments]
    # A process group of its own, so that those which it starts end with it.
    child = subprocess.Popen(command, env=environment, pass_fds=(writing,), process_group=0)
    os.close(writing)
    with _forwarded(child) as signals, os.fdopen(reading, "rb", buffering=0) as pipe:
        call, timed_out = _follow(pipe.fileno(), child)
        if timed_out:
            os.killpg(child.pid, signal.SIGKILL)
        return Ending(child.wait(), call, timed_out, signals)


def _follow(pipe: int, child: subprocess.Popen[bytes]) -> tuple[dict[str, Any], bool]:
    """The call that the command's process is in when it ends, {} for none, or that has taken too long."""
    call: dict[str, Any] = {}
    deadline, rest = float("inf"), b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(min(max(deadline - time.monotonic(), 0), LOOK_SECONDS)):
                if child.poll() is not None:  # and what it started holds the pipe
                    return call, False
                if time.monotonic() >= deadline:
                    return call, True
                continue
            data = os.read(pipe, 65536)
            if not data:
                return call, False
            *lines, rest = (rest + data).split(b"\n")
            if lines:
                call = json.loads(lines[-1])
                deadline = time.monotonic() + call["seconds"] if call else float("inf")


@contextmanager
def _forwarded(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Signals that are meant for the command reach all of its processes; the second Ctrl-C ends them. Gives what came."""
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        again = number == signal.SIGINT and number in received
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL if again else number)

    def stop(number: int, frame: object) -> None:  # Ctrl-Z
        os.killpg(child.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.killpg(child.pid, signal.SIGCONT)

    handlers = {**dict.fromkeys(FORWARDED, forward), signal.SIGTSTP: stop}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _restore_terminal() -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"{SHOW_CURSOR}\n")
        sys.stderr.flush()


def _error(ending: Ending) -> QConvertError:
    if ending.call:
        call = str(ending.call["call"])
        after = call.startswith("conversion_finished")
        kept = "the output is published" if after else "what was quantized is kept: the same command again resumes"
        return PluginError(
            "QC-PLUGIN-011" if ending.timed_out else "QC-PLUGIN-010",
            f"plugin {ending.call['plugin']} {ending.call['version']} {ending.how}: {call}",
            hint=f"{kept}; {'give it a larger --plugin-timeout' if ending.timed_out else 'report this to its author'}",
        )
    if ending.code == -signal.SIGKILL:
        return ResourceError(
            "QC-MEMORY-002",
            "the system ended the command's process (SIGKILL), most often for lack of memory",
            hint="free some, or convert on a larger machine; running the same command again resumes",
        )
    return QConvertError(
        "QC-INTERNAL-002",
        f"the command's process {ending.how}",
        hint="set QCONVERT_DEBUG=1 to see more, and report it; running the same command again resumes",
    )
