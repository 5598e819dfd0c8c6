"""Sources of samples, as users name them: a file of a kind that is read, or the text that comes with Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qconvert.errors import InputError, UsageError

BUILTIN = "builtin"
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
ARRAYS_SUFFIX = ".npz"


def data_file(source: str, suffixes: Sequence[str] = (*TEXT_SUFFIXES, ARRAYS_SUFFIX)) -> Path:
    """Return the file that a source names, which is there.

    Raises UsageError QC-DATA-002 for one that ends in none of `suffixes`, InputError QC-DATA-001 for one that is missing.
    """
    path = Path(source)
    if path.suffix not in suffixes:
        raise UsageError(
            "QC-DATA-002",
            f"{source!r} is no source of text",
            hint=f"give '{BUILTIN}' or a file that ends in {', '.join(TEXT_SUFFIXES)} or {ARRAYS_SUFFIX}; for ids of the "
            "Hugging Face Hub install the plugin qconvert-hub",
        )
    if not path.is_file():
        raise unreadable(path, "no such file")
    return path


def unreadable(path: Path, problem: str) -> InputError:
    """Return the error QC-DATA-001 for a data file with a `problem`, which is half a sentence."""
    return InputError("QC-DATA-001", f"data file {str(path)!r} can't be read: {problem}", hint="check the path and the file")
