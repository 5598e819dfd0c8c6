"""The lock of an output folder, which one run at a time holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from qconvert.errors import ResourceError
from qconvert.storage.disk import disk_errors


class Lock:
    """The lock file of one output. It is removed while it is held; filelock retries where it locked a removed file."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.parent / f".{output.name}.qconvert.lock"
        self.lock = FileLock(self.path)

    def __enter__(self) -> Self:
        """Raises ResourceError QC-LOCK-001 where another run holds it, QC-DISK-003 where it can't be written."""
        with disk_errors(self.path):
            try:
                self.lock.acquire(blocking=False)
            except Timeout as error:
                raise ResourceError(
                    "QC-LOCK-001",
                    f"another run works on {self.output}: process {self._holder()}",
                    hint="wait until it is done, or give another --output",
                ) from error
            self.path.write_text(f"{os.getpid()}\n")
        return self

    def _holder(self) -> str:
        try:
            return self.path.read_text().strip() or "unknown"
        except FileNotFoundError:  # it has just finished
            return "unknown"

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        self.lock.release()
