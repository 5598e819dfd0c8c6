"""Pauses of Python's cyclic garbage collector while imports and traces make many long-lived objects: it would find nothing to
free, and took a quarter of a short conversion.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the cyclic garbage collector within the context, for work that makes many objects and keeps most of them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Pause the collector for the imports of a program of ours, and take what they made out of its sight: modules live as long
    as the process, so no later collection goes through them, and none goes through all that is left when the process ends.
    """
    with uncollected():
        yield
    gc.freeze()
    atexit.register(gc.freeze)
