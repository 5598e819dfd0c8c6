"""When Python's cyclic garbage collector is not to look: it takes a quarter of the time of a short conversion."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within, no cycles are collected: for work that makes many objects and keeps most of them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """For the imports of a program of ours: modules live as long as the process, so no later collection goes through
    them, and none goes through all that is left when the process ends."""
    with uncollected():
        yield
    gc.freeze()
    atexit.register(gc.freeze)
