"""Checks that can't be made: whether that is the artifact's fault."""

from __future__ import annotations

import logging
from collections.abc import Callable

from qconvert.errors import QConvertError, is_out_of_memory
from qconvert.ir.report import Parity

logger = logging.getLogger("qconvert")


def attempt(target: str, check: Callable[[], Parity]) -> Parity:
    """What `check` finds; an artifact that can't be run has failed.

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
