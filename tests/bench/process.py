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
    """seconds: wall time; peak_resident, peak_anonymous: bytes, sampled every 20 ms over the process."""

    seconds: float
    peak_resident: int
    peak_anonymous: int


def run(command: list[str]) -> Cost:
    """Run to the end; a command that fails raises CalledProcessError with its stderr."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        peaks = {"VmHWM": 0, "RssAnon": 0}

        def watch() -> None:
            while process.poll() is None:
                try:
                    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                except OSError:
                    return
                for line in lines:
                    key, _, value = line.partition(":")
                    if key in peaks:
                        peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, stderr = process.communicate()
        watcher.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=stderr)
    return Cost(time.perf_counter() - begin, peaks["VmHWM"], peaks["RssAnon"])


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
