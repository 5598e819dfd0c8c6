"""The stage that a command is in, for an error that says where memory ran out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qconvert.errors import is_out_of_memory, told
from qconvert.ir.progress import Progress
from qconvert.supervision.memory import give_back


@contextmanager
def staged(progress: Progress) -> Iterator[Progress]:
    """Give a progress that knows which stage it is in.

    Raises ResourceError QC-MEMORY-001, which names it, for a lack of memory within the context, whatever it was taken for.
    """
    noting = _Noting(progress)
    try:
        yield noting
    except Exception as error:
        if is_out_of_memory(error) and (found := told(error, noting.name)) is not error:
            raise found from error
        raise


class _Noting:
    """Another progress, and the name of its latest stage."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.name: str | None = None

    def stage(self, name: str, total: int | None) -> None:
        """Begin a stage, with what the one before has freed."""
        give_back()
        self.name = name
        self.progress.stage(name, total)

    def advance(self, n: int = 1) -> None:
        """Pass `n` steps on."""
        self.progress.advance(n)
