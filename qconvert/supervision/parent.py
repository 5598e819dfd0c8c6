"""Every command runs in a process of its own, which this one watches, because plugins are foreign code.

The command's process says which call of which plugin it is in (plugin/host/calls.py). If that takes longer than it may, the
process is ended; if the process dies, it is known of what. Either way the output folder is what it was, what was quantized is
kept for the next run, the terminal is usable, and the error names the plugin. A plugin that can't even be imported is set
aside, and the command begins again without it. A command that is done says so: threads, exit handlers and processes that a
plugin has left behind don't keep the user waiting, and its exit code is the one that it gave.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import click

from qconvert.errors import PluginError, QConvertError, ResourceError
from qconvert.supervision.child import EXIT_SECONDS, become_watched, end_with_parent
from qconvert.supervision.memory import mapping_limit, oom_kills, require_libraries
from qconvert.supervision.messages import SET_ASIDE, WATCH, Channel

# Calls of every plugin there is, whatever the command: one that dies in them is left out.
WITHOUT_IT = ("import", "register_quantizers")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_SECONDS = 0.1
SHOW_CURSOR = "\x1b[?25h"  # ECMA-48 DECTCEM: progress bars hide it


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of the command's process: its exit code, negative for a signal, and what it told last (messages.Channel.state).

    told: {} where it could not open the channel.
    timed_out: it was ended because the call that it was in, or its end, took too long.
    signals: what this process was sent meanwhile, and passed on.
    out_of_memory: the kernel has killed processes for lack of memory meanwhile.
    """

    code: int
    told: Mapping[str, Any]
    timed_out: bool
    signals: Sequence[int]
    out_of_memory: bool = False

    @property
    def call(self) -> Mapping[str, Any]:
        """The plugin's call that it died in, {} for none."""
        return self.told.get("call") or {}

    @property
    def how(self) -> str:
        """The way in which the process ended, as the predicate of a sentence: "crashed with SIGSEGV"."""
        if "how" in self.call:
            return str(self.call["how"])
        if self.timed_out:
            return f"was ended after {self.call['seconds']:g} seconds"
        return f"crashed with {signal.Signals(-self.code).name}" if self.code < 0 else f"exited with code {self.code}"


def is_needed(arguments: Sequence[str]) -> bool:
    """Return whether the command needs a process that watches it: not for help, not in the watched process itself, and not
    where a debugger is to see the command.
    """
    asks = not arguments or any(argument in ("--help", "--version") for argument in arguments)
    return os.name == "posix" and not asks and WATCH not in os.environ and "QCONVERT_DEBUG" not in os.environ


def begin() -> None:
    """Prepare the command's process before it does anything else.

    It is no process of the terminal's foreground, but may write to it.
    """
    if WATCH in os.environ:
        become_watched()
        end_with_parent()
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)


def run(arguments: Sequence[str]) -> int:
    """Run the command and give its exit code.

    Raises PluginError QC-PLUGIN-010 if it died in a plugin, QC-PLUGIN-011 if a plugin took too long; ResourceError
    QC-MEMORY-002 if it was for lack of memory, and QConvertError QC-INTERNAL-002 if it crashed by itself.
    """
    require_libraries()
    set_aside: list[tuple[str, str, str, str]] = []
    while True:
        ending = _watch(arguments, set_aside)
        if not ending.told and ending.code >= 0:
            return ending.code
        if "exit" in ending.told and not ending.call:
            if ending.timed_out:
                _warn_of_what_was_left(ending.told["left"])
            return int(ending.told["exit"])
        _restore_terminal()
        if ending.signals:
            return 128 + ending.signals[0]
        verb, _, value = str(ending.call.get("call", "")).partition(" ")
        known = [(plugin, entry) for plugin, _, entry, _ in set_aside]
        if verb not in WITHOUT_IT or (ending.call["plugin"], value) in known:
            raise _error(ending)
        set_aside.append((ending.call["plugin"], ending.call["version"], value, f"its {verb} {ending.how}"))


def _watch(arguments: Sequence[str], set_aside: list[tuple[str, str, str, str]]) -> Ending:
    with _shared_file() as path:
        channel, killed = Channel(path), oom_kills()
        environment = {**os.environ, WATCH: str(path), SET_ASIDE: json.dumps(set_aside)}
        command = [sys.executable, "-m", "qconvert", *arguments]
        # A process group of its own, so that those which it starts end with it.
        child = subprocess.Popen(command, env=environment, process_group=0)
        with _forwarded(child) as signals:
            told, timed_out = _follow(channel, child)
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of the group
                os.killpg(child.pid, signal.SIGKILL)
            return Ending(child.wait(), told, timed_out, signals, out_of_memory=oom_kills() > killed)


@contextmanager
def _shared_file() -> Iterator[Path]:
    """A file for a channel, which lies in memory where there are such files; those of another process are opened in /proc."""
    with ExitStack() as closing:
        if sys.platform == "linux":
            descriptor = os.memfd_create("qconvert")
            closing.callback(os.close, descriptor)
            path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        else:
            path = Path(closing.enter_context(NamedTemporaryFile(prefix="qconvert-")).name)
        os.truncate(path, Channel.SIZE)
        yield path


def _follow(channel: Channel, child: subprocess.Popen[bytes]) -> tuple[dict[str, Any], bool]:
    """Return what the command's process told last before it ended, or that its call took too long."""
    told: dict[str, Any] = {}
    while True:
        ended = _has_ended(child)
        told = channel.state() or told
        if ended:
            return told, False
        if time.monotonic() >= told.get("until", float("inf")):
            return told, True


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    try:
        child.wait(LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _warn_of_what_was_left(threads: str) -> None:
    left = threads or "an exit handler of a plugin or a library"
    click.echo(f"warning: {left} ran on for {EXIT_SECONDS} seconds after the command was done, and was ended", err=True)


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
    is_killed = ending.code == -signal.SIGKILL and not ending.timed_out
    if is_killed and (ending.out_of_memory or not ending.call):
        during = f" during {ending.call['call']} of plugin {ending.call['plugin']}" if ending.call else ""
        reason = "for lack of memory" if ending.out_of_memory else "most often for lack of memory"
        return _no_memory(f"the system ended the command's process (SIGKILL){during}, {reason}")
    if ending.call:
        call = str(ending.call["call"])
        after = call.startswith("conversion_finished")
        kept = "the output is published" if after else "what was quantized is kept: the same command again resumes"
        return PluginError(
            "QC-PLUGIN-011" if ending.timed_out else "QC-PLUGIN-010",
            f"plugin {ending.call['plugin']} {ending.call['version']} {ending.how}: {call}",
            hint=f"{kept}; {'give it a larger --plugin-timeout' if ending.timed_out else 'report this to its author'}",
        )
    if (limit := mapping_limit()) is not None:  # C++, OpenMP and BLAS end a process that gets no memory
        return _no_memory(
            f"the command's process {ending.how}, most often for lack of memory: ulimit -v or -d allows it {limit} bytes"
        )
    return QConvertError(
        "QC-INTERNAL-002",
        f"the command's process {ending.how}",
        hint="set QCONVERT_DEBUG=1 to see more, and report it; running the same command again resumes",
    )


def _no_memory(what: str) -> ResourceError:
    hint = "free some, or convert on a larger machine; running the same command again resumes"
    return ResourceError("QC-MEMORY-002", what, hint=hint)
