"""Writes that say what went wrong, and stay."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qconvert.errors import ResourceError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into ResourceError QC-DISK-002 (disk full, quota) or QC-DISK-003."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                "QC-DISK-002",
                f"no space left while writing {path}: {error.strerror}; the output was not changed",
                hint="free space on that disk, then run the same command again: finished blocks are kept",
            ) from error
        raise ResourceError(
            "QC-DISK-003",
            f"can't write {path}: {error.strerror or error}; the output was not changed",
            hint="give an --output folder that can be written",
        ) from error


def fsync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, would survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file of a folder that is not staged: there is the old content, or the complete new one, at every moment.

    Raises ResourceError QC-DISK-002 on a full disk, QC-DISK-003 where it can't be written.
    """
    new = path.with_name(f".{path.name}.qconvert-new")
    with disk_errors(path):
        new.write_bytes(content)
        fsync(new)
        new.replace(path)
        fsync(path.parent)
