"""Git LFS pointers, which stand where a file was not downloaded."""

from __future__ import annotations

from pathlib import Path

from qconvert.errors import InputError

_GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_git_lfs_pointer(path: Path) -> None:
    """Raise InputError QC-INPUT-004 where git left a pointer in place of the file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(_GIT_LFS_POINTER)) == _GIT_LFS_POINTER:
            raise InputError(
                "QC-INPUT-004",
                f"{path} is a Git LFS pointer of {path.stat().st_size} bytes, not the file itself",
                hint="run `git lfs install` and `git lfs pull` in the folder",
            )
