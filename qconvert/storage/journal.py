"""The journal of a stage: what is safely on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert.storage.disk import disk_errors, fsync


class Journal:
    """Append-only JSON lines; a record that `append` has returned from survives a power loss."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: list[dict[str, Any]] = []
        if not path.exists():
            return
        valid = 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # torn by a kill
            try:
                self._records.append(json.loads(line))
            except ValueError:
                break
            valid += len(line)
        os.truncate(path, valid)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record at the end, on disk before this returns. Raises ResourceError (disk)."""
        with disk_errors(self.path):
            with self.path.open("ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
            fsync(self.path)
            fsync(self.path.parent)
        self._records.append(dict(record))

    def records(self) -> tuple[dict[str, Any], ...]:
        """Return every record, the oldest first."""
        return tuple(self._records)
