"""Progress: how stages tell how far they are. The command line shows it; a library call stays silent."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Stages follow one another; steps count in the latest one."""

    def stage(self, name: str, total: int | None) -> None:
        """Begin a stage, which ends the one before. total: its number of steps, None if it isn't known."""

    def advance(self, n: int = 1) -> None:
        """Count `n` more steps of the stage as done."""


class Silent:
    """Shows nothing."""

    def stage(self, name: str, total: int | None) -> None:
        """Say nothing."""
        pass

    def advance(self, n: int = 1) -> None:
        """Say nothing."""
        pass


silent = Silent()
