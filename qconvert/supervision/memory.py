"""The memory that a process may take, as Linux tells it. Elsewhere nothing is known, and nothing limited."""

from __future__ import annotations

import sys
from pathlib import Path

from qconvert.errors import ResourceError

ROOT = Path("/")
# What a process maps that has imported torch without CUDA, transformers and ONNX Runtime: measured, 2.13, 5.23 and 1.31.
LIBRARIES_BYTES = 1_050_000_000


def oom_kills(root: Path = ROOT) -> int:
    """Return how many processes the kernel has killed for lack of memory, of the machine or of a container."""
    try:
        counters = dict(line.split() for line in (root / "proc/vmstat").read_text(encoding="ascii").splitlines())
    except OSError:
        return 0
    return int(counters.get("oom_kill", 0))


def mapping_limit() -> int | None:
    """Return how many bytes this process may map (ulimit -v, ulimit -d), None for as many as it likes."""
    if sys.platform == "win32":
        return None
    import resource

    soft = (resource.getrlimit(each)[0] for each in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return min((limit for limit in soft if limit != resource.RLIM_INFINITY), default=None)


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
