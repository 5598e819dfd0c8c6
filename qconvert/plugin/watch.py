"""Tells the process that watches over this one what a plugin is doing, so that a plugin that hangs or crashes has a name.

`qconvert` on the command line starts the command in a process of its own (cli/watched.py). Before it calls a third party's
code, that process writes a line to the pipe that QCONVERT_WATCH names, and an empty one when the call has returned. Without
such a pipe nothing is told, and nothing limited.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qconvert.ir.process import WATCH
from qconvert.plugin.distribution import Distribution, builtin
from qconvert.recipe import PLUGIN_SECONDS

AVAILABLE_SHARE = 0.9  # of the memory that is available when a call begins: what it may take

_seconds: float = PLUGIN_SECONDS


def limit_calls(seconds: float) -> None:
    """From now on, every call of a plugin may take this long."""
    global _seconds
    _seconds = seconds


def descriptors() -> tuple[int, ...]:
    """What a child process has to inherit so that its plugins are watched too."""
    watch = os.environ.get(WATCH)
    return (int(watch),) if watch else ()


@contextmanager
def calling(distribution: Distribution, call: str) -> Iterator[None]:
    """While code of a plugin runs: `call` says what is asked of it, e.g. "quantize 'model.layers.0.mlp.up_proj'".

    It may take 90 % of the memory that is available when it begins; an allocation beyond that fails, in the plugin.
    """
    pipes = descriptors()
    if not pipes or distribution == builtin():
        yield
        return
    _tell(pipes[0], {"plugin": distribution.name, "version": distribution.version, "call": call, "seconds": _seconds})
    try:
        with _limited_memory():
            yield
    finally:
        _tell(pipes[0], {})


def _tell(pipe: int, state: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # the watching process has gone
        os.write(pipe, json.dumps(state).encode() + b"\n")


@contextmanager
def _limited_memory() -> Iterator[None]:
    """RLIMIT_DATA counts what a process maps to write to, and nothing that it maps of files."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _data_bytes() + int(AVAILABLE_SHARE * _available_bytes())
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[5]
    return int(pages) * os.sysconf("SC_PAGESIZE")


def _available_bytes() -> int:
    """Of the machine, or of the control group (a container) if that has less."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        group = Path("/sys/fs/cgroup")
        allowed, used = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        available = min(available, max(allowed - used, 0))
    return available
