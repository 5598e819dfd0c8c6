"""The memory that loading an artifact takes, in a process that does nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from qconvert.supervision.child import import_path
from qconvert.targets.cpu import CPU

# Linux tells resident memory and its peak, in kB, of the process that asks.
STATUS = Path("/proc/self/status")
PROGRAM = f"""
import sys
import onnxruntime

options = onnxruntime.SessionOptions()
options.log_severity_level = 4
sessions = [onnxruntime.InferenceSession(path, options, providers=["{CPU.provider}"]) for path in sys.argv[1:]]
status = dict(line.split(":", 1) for line in open("{STATUS}"))
print(*(int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")))
"""


def footprint(graphs: Iterable[Path]) -> tuple[int, int] | None:
    """Return the resident bytes of a process that has loaded graphs for the CPU, and the most that it had meanwhile.

    None where the system does not tell, or the process does not come to its end.
    """
    if not STATUS.exists():
        return None
    command = [sys.executable, "-c", PROGRAM, *map(str, graphs)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **import_path()})
    if run.returncode:
        return None
    resident, peak = map(int, run.stdout.split())
    return resident, peak
