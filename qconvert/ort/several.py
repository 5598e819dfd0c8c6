"""Several calls at once, each on a thread of its own: for sessions that compute on one thread each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def several(call: Callable[[Item], Result], items: Iterable[Item], at_once: int) -> Generator[Result]:
    """Yield what `call` makes of each item, in their order. At most `at_once` items are being worked on, or wait to be taken.

    Raises what a call raises, when it is its turn.
    """
    if at_once == 1:
        yield from map(call, items)
        return
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(at_once)
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            del item  # or the last would be kept
            if len(waiting) == at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
