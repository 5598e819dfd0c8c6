"""The verdict of a parity, made of a difference or of a check that could not be made."""

from __future__ import annotations

import logging
from collections.abc import Callable

from qconvert.errors import QConvertError, is_out_of_memory
from qconvert.ir.report import Parity
from qconvert.verify.parity import TOLERANCE

NOT_COMPARABLE = "outputs are not finite, or of another shape"

logger = logging.getLogger("qconvert")


def attempt(target: str, check: Callable[[], Parity]) -> Parity:
    """Return what `check` finds; an artifact that can't be run has failed.

    Raises what says nothing about the artifact: a lack of memory, and errors that know their cause.
    """
    try:
        return check()
    except QConvertError:
        raise
    except Exception as failure:
        if is_out_of_memory(failure):
            raise
        logger.debug("parity on %s could not be measured", target, exc_info=True)
        return Parity(target=target, status="failed", reason=f"it can't be run: {type(failure).__name__}: {failure}")


def measured_parity(target: str, measure: Callable[[], float], *, pieces: int | None = None) -> Parity:
    """Judge a measured difference, or say what went wrong: an artifact that can't be run has failed."""
    return attempt(target, lambda: judged(target, measure(), pieces=pieces))


def judged(target: str, error: float, what: str = "outputs", *, pieces: int | None = None) -> Parity:
    """Judge the largest relative difference of `what`. pieces: see Parity."""
    if error <= TOLERANCE:
        return Parity(target=target, status="passed", max_relative_error=error, pieces=pieces)
    if error == float("inf"):
        return Parity(target=target, status="failed", pieces=pieces, reason=NOT_COMPARABLE)
    reason = f"{what} differ by {error:.1e} of the largest, the limit is {TOLERANCE:.0e}"
    return Parity(target=target, status="failed", max_relative_error=error, pieces=pieces, reason=reason)
