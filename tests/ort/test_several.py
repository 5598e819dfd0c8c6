"""Several calls at once: in order, not too many, and an error when it is its turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count

import pytest

from qconvert.ort.several import several


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(at_once: int) -> None:
    assert list(several(lambda item: item * item, range(20), at_once)) == [item * item for item in range(20)]


def test_calls_run_at_the_same_time() -> None:
    meeting = threading.Barrier(3)
    # Each call waits for two others.
    assert sorted(several(lambda _: meeting.wait(timeout=60), range(6), 3)) == [0, 0, 1, 1, 2, 2]


def test_no_more_items_are_taken_than_are_worked_on() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in count():
            taken.append(item)
            yield item

    results = several(abs, items(), 4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    results.close()
    assert len(taken) == 6  # three that were given, and the three behind them


def test_an_error_is_raised_after_the_results_before_it() -> None:
    results = several(lambda item: 6 // item, [3, 2, 0, 1], 2)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
