"""The name of an output folder: whether it may be taken, who works on it, and how a complete folder comes to stand there.

PARENT/
  OUT/                            the old folder or the complete new one, never anything between
  .OUT.qconvert.lock              held while a run works on OUT; names its process
  .OUT.qconvert-old/              the old folder, between the two renames of a system that can't swap
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from qconvert.errors import UsageError
from qconvert.ir.artifact import MANIFEST
from qconvert.storage.disk import disk_errors, fsync
from qconvert.storage.lock import Lock


def check_output(output: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raise what keeps `output` from being taken, before any work is done for it: UsageError QC-OUTPUT-001 to 005,
    ResourceError QC-LOCK-001 where another run works on it.

    inputs: files and folders that are read, and must not be written.
    """
    output = output.resolve()
    check_place(output, inputs)
    if Lock(output).path.exists():  # held, or left by a run that was killed
        with Lock(output):
            finish_publish(output)
    recover(output)
    check_free(output, force)


def check_place(output: Path, inputs: Iterable[Path]) -> None:
    """Raise UsageError if writing `output` would touch an input, or can't be done by renaming."""
    for path in (path.resolve() for path in inputs):
        inside = any(_same(parent, path) for parent in (output, *output.parents))
        if inside or any(_same(output, parent) for parent in path.parents):
            raise UsageError(
                "QC-OUTPUT-001",
                f"output {output} is, contains or lies inside the input {path}",
                hint="give an --output folder beside the inputs",
            )
    if output.is_mount():
        raise UsageError(
            "QC-OUTPUT-002", f"output {output} is a mount point", hint=f"give a folder inside it, e.g. {output / 'model'}"
        )


def check_free(output: Path, force: bool) -> None:
    """Raise UsageError if there is something at `output` that may not be replaced."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError("QC-OUTPUT-003", f"output {output} is a file", hint="give an --output folder that doesn't exist yet")
    if not force:
        raise UsageError("QC-OUTPUT-004", f"output {output} exists", hint="give --force to replace it, or another --output")
    if not (output / MANIFEST).exists() and any(output.iterdir()):
        raise UsageError(
            "QC-OUTPUT-005",
            f"output {output} holds files, but no {MANIFEST}: qconvert didn't write it, so --force won't delete it",
            hint="remove the folder yourself, or give another --output",
        )


def _same(one: Path, other: Path) -> bool:
    """Return whether two paths are one place, also where the file system ignores case."""
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def publish(folder: Path, output: Path) -> None:
    """Make the complete `folder` the output, in one step where the system can swap two names.

    Where it can't, a process that is killed between two renames leaves none of that name: see `recover`.
    """
    if not output.exists():
        folder.rename(output)
    elif not _exchange(folder, output):
        old = _old(output)
        output.rename(old)
        folder.rename(output)
        shutil.rmtree(old)
    fsync(output.parent)


def recover(output: Path) -> None:
    """Put the old folder back where a `publish` by two renames was killed between them.

    For every command that reads the name or asks what stands there. Raises ResourceError QC-LOCK-001 where that publish is
    still at work, QC-DISK-003 where nothing can be renamed.
    """
    output = output.resolve()
    if _old(output).exists() and not output.exists():
        with Lock(output):
            finish_publish(output)


def finish_publish(output: Path) -> None:
    """Finish, or take back, a publish by two renames that was killed between them; for who holds the lock."""
    old = _old(output)
    with disk_errors(output):
        if old.exists() and not output.exists():
            old.rename(output)
        elif old.exists():
            shutil.rmtree(old)


def _old(output: Path) -> Path:
    return output.parent / f".{output.name}.qconvert-old"


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system can't (renameat2, Linux >= 3.15)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    if rename(current_folder, os.fsencode(one), current_folder, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
