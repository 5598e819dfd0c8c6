"""Runs a command and watches what it takes."""

from __future__ import annotations

import itertools
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """seconds: wall time; peak_resident, peak_anonymous: bytes of the largest process, looked at every 20 ms."""

    seconds: float
    peak_resident: int
    peak_anonymous: int


def run(command: list[str]) -> Cost:
    """Run to the end; a command that fails raises CalledProcessError with its stderr."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        samples = [(0, 0)]

        def watch() -> None:
            while process.poll() is None:
                samples.append(memory(process.pid))
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, stderr = process.communicate()
        watcher.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=stderr)
    resident, anonymous = zip(*samples, strict=True)
    return Cost(time.perf_counter() - begin, max(resident), max(anonymous))


def memory(pid: int) -> tuple[int, int]:
    """(peak resident, anonymous) bytes, the most of a process and those that it started: qconvert works in one that it watches.

    No sums: a process that has just been forked shows the memory of the one that it came from.
    """
    folder = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        children = " ".join(path.read_text() for path in folder.glob("task/*/children")).split()
    except OSError:  # it has ended
        return 0, 0
    own = [int(status.get(key, "0 kB").split()[0]) * 1024 for key in ("VmHWM", "RssAnon")]
    resident, anonymous = zip(own, *(memory(int(child)) for child in children), strict=True)
    return max(resident), max(anonymous)


def run_stages(command: list[str]) -> tuple[str, dict[str, float]]:
    """stdout, and the seconds that passed from each `qconvert: STAGE` line on stderr to the next; first come, first kept."""
    begun: list[tuple[str, float]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        stderr = []
        for line in process.stderr:
            stderr.append(line)
            if line.startswith("qconvert: "):
                begun.append((line.removeprefix("qconvert: ").strip(), time.perf_counter()))
        stdout = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr="".join(stderr))
    seconds: dict[str, float] = {}
    for (name, start), (_, end) in itertools.pairwise(begun):
        seconds.setdefault(name, end - start)
    return stdout, seconds
