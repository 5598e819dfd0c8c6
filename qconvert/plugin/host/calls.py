"""Every call of a third party's code: told to who watches, and leaving the process as it was.

`qconvert` on the command line starts the command in a process of its own (supervision/parent.py). Before it calls a third
party's code, that process tells who watches, so that a plugin that hangs or crashes has a name, and again when the call has
returned. Where nobody watches, nothing is told, and nothing limited.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qconvert.errors import in_one_line
from qconvert.plugin.host.distribution import Distribution, builtin
from qconvert.plugin.host.process_settings import settings_kept
from qconvert.supervision import child
from qconvert.supervision.memory import memory_left
from qconvert.vocabulary import PLUGIN_SECONDS

AVAILABLE_SHARE = 0.9  # of the memory that is available when a call begins: what it may take
TOLD_CHARACTERS = 4000  # of a call: what is told has to fit into a messages.Channel

logger = logging.getLogger(__name__)

_seconds: float = PLUGIN_SECONDS
_said: set[tuple[Distribution | str, ...]] = set()  # warnings are not repeated


def limit_calls(seconds: float) -> None:
    """Limit every call of a plugin to this time from now on."""
    global _seconds
    _seconds = seconds


@contextmanager
def calling(distribution: Distribution, call: str) -> Iterator[None]:
    """Guard code of a plugin within the context; `call` says what is asked of it, e.g. "quantize 'model.layers.0.mlp.up_proj'".

    Settings of the process are put back, with a warning. What the code raises is an Exception or a SystemExit, but for Ctrl-C:
    libraries in Rust panic with another BaseException. Where the process is watched, the call may take 90 % of the memory that
    is available when it begins (an allocation beyond that fails, in the plugin), and what it writes to file 1, in whatever
    language or process, is not on stdout.
    """
    if distribution == builtin():
        yield
        return
    with ExitStack() as around:
        around.enter_context(_settings_kept(distribution))
        if child.is_watched():
            around.enter_context(_told(distribution, call))
            around.enter_context(_limited_memory())
        around.enter_context(_one_process())
        around.enter_context(_threads_noted(distribution))
        try:
            yield
        except (Exception, SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise RuntimeError(f"{type(error).__name__}: {in_one_line(error)}") from error


@contextmanager
def _settings_kept(distribution: Distribution) -> Iterator[None]:
    changed: list[str] = []
    try:
        with settings_kept() as changed:
            yield
    finally:
        if changed and (distribution, *changed) not in _said:
            _said.add((distribution, *changed))
            logger.warning(
                "plugin %s changed what belongs to the whole process, and is put back: %s", distribution, ", ".join(changed)
            )


@contextmanager
def _told(distribution: Distribution, call: str) -> Iterator[None]:
    """Tell the watching process of a call within the context.

    Files 0 to 2 are afterwards what they were; until then, what is written to 1 goes to stderr.

    A process whose files were closed can't go on: it ends in the call, and who watches knows why.
    """
    told = {"plugin": distribution.name, "version": distribution.version, "call": call[:TOLD_CHARACTERS], "seconds": _seconds}
    child.tell_call(told, _seconds)
    kept = list(_copies())
    with contextlib.suppress(OSError):  # there is no stderr
        os.dup2(2, 1)
    try:
        yield
    finally:
        for number, copy, status in kept:
            if not _is_open(copy, status):
                child.tell_call({**told, "how": "closed files that it did not open"}, _seconds)
                os._exit(1)
            os.dup2(copy, number)
            os.close(copy)
        child.tell_call(None)


def _copies() -> Iterator[tuple[int, int, os.stat_result]]:
    """The standard files that are open: number, descriptor of a copy, and status."""
    for number in (0, 1, 2):
        with contextlib.suppress(OSError):
            copy = os.dup(number)
            yield number, copy, os.fstat(copy)


def _is_open(descriptor: int, status: os.stat_result) -> bool:
    """Return whether a descriptor is still the file that had that status."""
    try:
        return os.path.samestat(os.fstat(descriptor), status)
    except OSError:
        return False


@contextmanager
def _one_process() -> Iterator[None]:
    """A fork that comes back from the call would run the rest of the command a second time."""
    mine = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != mine:
            os._exit(1)


@contextmanager
def _threads_noted(distribution: Distribution) -> Iterator[None]:
    before = set(threading.enumerate())
    try:
        yield
    finally:
        new = set(threading.enumerate()) - before
        child.left_running.update({thread: f"plugin {distribution}" for thread in new if not thread.daemon})


@contextmanager
def _limited_memory() -> Iterator[None]:
    """RLIMIT_DATA counts what a process maps to write to, private mappings of files too; the limit has those that are there."""
    left = memory_left()
    if sys.platform != "linux" or left is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _data_bytes() + int(AVAILABLE_SHARE * left.free)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[5]
    return int(pages) * os.sysconf("SC_PAGESIZE")
