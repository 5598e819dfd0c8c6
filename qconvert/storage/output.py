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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from qconvert.errors import ResourceError, UsageError
from qconvert.ir.artifact import MANIFEST


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
    """Raises UsageError if writing `output` would touch an input, or can't be done by renaming."""
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
    """Raises UsageError if there is something at `output` that may not be replaced."""
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
    """Whether two paths are one place, also where the file system ignores case."""
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


def fsync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, would survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
