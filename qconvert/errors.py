"""Errors that a user can act on.

    QConvertError            exit code
    ├── UsageError           2   usage, recipe or plan
    ├── InputError           3   the source or the data was rejected
    ├── PluginError          4   a plugin failed or broke its contract
    ├── ParityError          5   the artifact does not compute what its weights say
    ├── ResourceError        6   disk, memory or lock
    └── TargetError          7   a requested target could not be run here

A missed gate is a verdict, not an error: exit code 1. Every error carries a stable code, says what and
where (file, tensor, numbers), and what to do next. `docs/errors.md` lists the codes; a test keeps it true.
"""

from __future__ import annotations

import re
from typing import ClassVar

# What torch, ONNX Runtime, CUDA, libraries in Rust and the system say when there is no memory left, in errors of many types.
_NO_MEMORY = re.compile(
    r"(can't|cannot|failed to|unable to) allocate|bad[_ ]alloc|out ?of ?memory|not enough memory|MemoryError"
    r"|failed to map segment|can't start new thread",
    re.IGNORECASE,
)
NO_MEMORY = "QC-MEMORY-001"


class QConvertError(Exception):
    """Base of all errors that qconvert raises on purpose.

    code: stable identifier, "QC-INPUT-003".
    message: what happened and where.
    hint: what to do next.

    Names of a checkpoint get into both: what is not printable in them is escaped, as a terminal would obey it.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, code: str, message: str, *, hint: str) -> None:
        self.code, self.message, self.hint = code, printable(message), printable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}\n  next: {self.hint}"


class UsageError(QConvertError):
    """The command line, the recipe or the plan cannot be carried out."""

    exit_code = 2


class InputError(QConvertError):
    """The source checkpoint or the data is missing, damaged or unsafe."""

    exit_code = 3


class PluginError(QConvertError):
    """A plugin could not be loaded, raised, or returned something that breaks its contract."""

    exit_code = 4


class ParityError(QConvertError):
    """The artifact disagrees with its own dequantized weights: a bug of qconvert, never of the user."""

    exit_code = 5


class ResourceError(QConvertError):
    """Disk, memory or a lock is not available."""

    exit_code = 6


class TargetError(QConvertError):
    """A requested target could not be run on this machine."""

    exit_code = 7


def printable(text: str) -> str:
    """Return `text` in one line, harmless on a terminal: where it holds control characters or the like, only ASCII stays."""
    if text.isprintable():
        return text
    return "".join(each if " " <= each <= "~" else ascii(each)[1:-1] for each in text)


def in_one_line(error: BaseException) -> str:
    """Return in one line what an exception of foreign code says: it may take several lines, or raise another exception."""
    try:
        text = str(error)
    except Exception as another:
        text = f"its message can't be had: {type(another).__name__}"
    return " ".join(text.split())


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether there was no memory left for something, perhaps in a library that wraps this in an error of its own.

    So do we: a tokenizer that can't be opened is an InputError, whatever the reason. Its text is ours and says nothing.
    """
    seen: set[int] = set()  # `raise error from error` is its own cause
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, MemoryError) or (not isinstance(cause, QConvertError) and _NO_MEMORY.search(in_one_line(cause))):
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return False


def told(error: BaseException, stage: str | None = None) -> QConvertError:
    """Return the error to show for what was raised: a lack of memory, whatever it was taken for on its way; an error that was
    raised on purpose, as it is; and for all else that qconvert has a bug.

    stage: in which it came up, where that is known.
    """
    if isinstance(error, QConvertError) and (error.code == NO_MEMORY or not is_out_of_memory(error)):
        return error
    if is_out_of_memory(error):
        text = error.message if isinstance(error, QConvertError) else in_one_line(error) or type(error).__name__
        return ResourceError(
            NO_MEMORY,
            f"not enough memory{f' in the stage {stage!r}' if stage else ''}: {text}",
            hint="free some, or take a larger machine (qconvert plan tells the peak); what was quantized is kept: the same "
            "command again resumes",
        )
    return QConvertError(
        "QC-INTERNAL-001",
        f"internal error: {type(error).__name__}: {in_one_line(error)}",
        hint="this is a bug of qconvert: set QCONVERT_DEBUG=1 to see the traceback, and report it",
    )
