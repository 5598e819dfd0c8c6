"""The memory that a process may take, as Linux tells it. Elsewhere nothing is known, and nothing limited."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qconvert.errors import ResourceError

ROOT = Path("/")
# Version 1 has a number for no limit as well, which is beyond every machine's memory.
UNLIMITED = 1 << 60
# What a process maps that has imported torch without CUDA, transformers and ONNX Runtime: measured, 2.13, 5.23 and 1.31.
LIBRARIES_BYTES = 1_050_000_000


def give_back() -> None:
    """Hand memory that was freed back to the system: glibc keeps it for whoever asks next, and another process may need it."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another libc than glibc
            ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True, slots=True)
class Limit:
    """A number of bytes that may still be taken, and whose limit that is, as users know it: "this machine"."""

    free: int
    owner: str


@dataclass(frozen=True, slots=True)
class ControlGroups:
    """One version of control groups: where their folders are mounted, and how the files in them are called.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
    """

    mounts: tuple[str, ...]
    controllers: str
    limit: str
    used: str
    cached: tuple[str, ...]


VERSIONS = (
    ControlGroups(
        ("sys/fs/cgroup", "sys/fs/cgroup/unified"), "", "memory.max", "memory.current", ("inactive_file", "active_file")
    ),
    ControlGroups(
        ("sys/fs/cgroup/memory",),
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def memory_left(root: Path = ROOT) -> Limit | None:
    """Return how much memory there is: of the machine or of a control group (a container) around this process, whichever has
    the least. None where the system does not tell.
    """
    found = [*_of_machine(root), *_of_control_groups(root)]
    return min(found, key=lambda limit: limit.free, default=None)


def _of_machine(root: Path) -> Iterator[Limit]:
    with contextlib.suppress(OSError):
        kilobytes = _numbers(root / "proc/meminfo", ":")
        yield Limit(1024 * (kilobytes["MemAvailable"] + kilobytes.get("SwapFree", 0)), "this machine")


def _of_control_groups(root: Path) -> Iterator[Limit]:
    """The limits of the group that this process is in, and of those around it.

    A container may see its own group at the mount and know it by the name that it has outside, so that folder need not exist.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            for version in VERSIONS:
                if version.controllers in controllers.split(","):
                    inside = Path(path.lstrip("/"))
                    for mount in version.mounts:
                        for part in (inside, *inside.parents):
                            yield from _of_control_group(root / mount / part, version)


def _of_control_group(folder: Path, version: ControlGroups) -> Iterator[Limit]:
    """What is left of its limit; pages of files count as used, and are given back when others want them."""
    with contextlib.suppress(OSError, ValueError):  # there is no such folder; "max"
        limit = int((folder / version.limit).read_text(encoding="ascii"))
        if limit >= UNLIMITED:
            return
        used = int((folder / version.used).read_text(encoding="ascii"))
        statistics = _numbers(folder / "memory.stat")
        cached = sum(statistics.get(name, 0) for name in version.cached)
        yield Limit(max(limit - max(used - cached, 0), 0), f"the control group of {folder / version.limit}")


def _numbers(file: Path, separator: str | None = None) -> dict[str, int]:
    """The numbers in a file of the kernel, by the name before each."""
    lines = (line.split(separator, 1) for line in file.read_text(encoding="ascii").splitlines())
    return {name: int(text.split()[0]) for name, text in lines}


def oom_kills(root: Path = ROOT) -> int:
    """Return how many processes the kernel has killed for lack of memory, of the machine or of a container."""
    with contextlib.suppress(OSError):
        return _numbers(root / "proc/vmstat").get("oom_kill", 0)
    return 0


def mapping_limit() -> int | None:
    """Return how many bytes this process may map (ulimit -v, ulimit -d), None for as many as it likes."""
    if sys.platform == "win32":
        return None
    import resource

    soft = (resource.getrlimit(each)[0] for each in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return min((limit for limit in soft if limit != resource.RLIM_INFINITY), default=None)


def shortage(memory: int, files: int, processes: int = 1, root: Path = ROOT) -> Limit | None:
    """Return the limit that this process meets if it comes to hold `memory` bytes in all, and maps so many more of files; None
    where that is within all limits. The number of the limit is what could be held.

    processes: those that hold it together. What may be mapped is limited for each, and one of them, which begins with as much
        as this one has now, comes to hold the rest.
    """
    held, mapped = _held_and_mapped(root)
    left, most = memory_left(root), mapping_limit()
    if left is not None and memory > left.free + held:
        return Limit(left.free + held, left.owner)
    if most is not None and mapped + files + memory - processes * held > most:
        return Limit(max(most - mapped - files + processes * held, 0), f"ulimit -v or -d, beside {files} bytes of mapped files")
    return None


def _held_and_mapped(root: Path) -> tuple[int, int]:
    """The bytes of memory that this process holds, without pages of files, and the bytes that it maps."""
    try:
        status = dict(line.split(":", 1) for line in (root / "proc/self/status").read_text(encoding="utf-8").splitlines())
        return 1024 * int(status["RssAnon"].split()[0]), 1024 * int(status["VmSize"].split()[0])
    except (OSError, KeyError):
        return 0, 0


def require_libraries() -> None:
    """Raise ResourceError QC-MEMORY-003 where a process may not map the libraries: some of them crash then, or hang."""
    limit = mapping_limit()
    if limit is not None and limit < LIBRARIES_BYTES:
        raise ResourceError(
            "QC-MEMORY-003",
            f"a process may map {limit} bytes here (ulimit -v or -d), and torch, transformers and ONNX Runtime take about "
            f"{LIBRARIES_BYTES}",
            hint="give a larger limit, or ulimit -v unlimited",
        )
