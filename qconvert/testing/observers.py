"""Checks of the observers that a quantizer declares; without observers there is nothing to fail."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qconvert.plugin.observer import Observer
from qconvert.plugin.quantizer import Quantizer
from qconvert.testing.failure import CheckFailure
from qconvert.testing.samples import normal

WIDTH = 24
PARTS = (slice(0, 17), slice(17, 40), slice(40, 64))
# Float rounding of a sum over 64 rows: 64 terms at 6e-8 each.
ROUNDING = 64 * 2**-24


def check_observers_take_any_batches(quantizer: Quantizer) -> None:
    """Rows seen in one call or in several give the same statistic: batches can be of any size."""
    for kind in quantizer.observers:
        observer = kind()
        for part in PARTS:
            observer.update(_rows()[part], _importance()[part])
        _require_equal(kind, observer.finalize(), _seen(kind, slice(None)).finalize(), f"{len(PARTS)} batches instead of one")


def check_observers_merge_as_one(quantizer: Quantizer) -> None:
    """Observers that are merged have seen what one would have."""
    for kind in quantizer.observers:
        first, *others = _each(kind)
        for other in others:
            first.merge(other)
        _require_equal(kind, first.finalize(), _seen(kind, slice(None)).finalize(), f"{len(PARTS)} observers instead of one")


def check_observers_merge_associatively(quantizer: Quantizer) -> None:
    """(a + b) + c and a + (b + c) are the same: workers finish in any order."""
    for kind in quantizer.observers:
        a, b, c = _each(kind)
        a.merge(b)
        a.merge(c)
        d, e, f = _each(kind)
        e.merge(f)
        d.merge(e)
        _require_equal(kind, d.finalize(), a.finalize(), "a + (b + c) instead of (a + b) + c")


def check_observers_merge_with_empty(quantizer: Quantizer) -> None:
    """One that begins empty and takes in chunk after chunk, as qconvert does, has seen all; one without rows adds nothing."""
    for kind in quantizer.observers:
        expected = _seen(kind, slice(None)).finalize()
        total, full = kind(), _seen(kind, slice(None))
        for chunk in _each(kind):
            total.merge(chunk)
        full.merge(kind())
        _require_equal(kind, total.finalize(), expected, f"an empty one that takes in {len(PARTS)} chunks")
        _require_equal(kind, full.finalize(), expected, "64 rows that take in an empty one")


def check_observers_leave_each_other(quantizer: Quantizer) -> None:
    """What is merged into another stays what it was, also when either of them sees more."""
    for kind in quantizer.observers:
        first, second, _ = _each(kind)
        empty = kind()
        first.merge(second)
        empty.merge(second)
        for grown in (first, empty):
            grown.update(_rows()[PARTS[2]] * 2, _importance()[PARTS[2]])
        _require_equal(kind, second.finalize(), _seen(kind, PARTS[1]).finalize(), "one that was merged into two others")


def check_observers_leave_rows(quantizer: Quantizer) -> None:
    """Rows are neither changed nor kept: they are the model's own activations, and their memory is used again."""
    for kind in quantizer.observers:
        rows, importance = _rows(), _importance()
        observer = kind()
        observer.update(rows, importance)
        changed = int((rows != _rows()).sum()) + int((importance != _importance()).sum())
        if changed:
            raise CheckFailure(f"observer {kind.name!r}: update changed {changed} of {rows.numel() + len(rows)} numbers")
        rows.fill_(7)
        importance.fill_(7)
        _require_equal(kind, observer.finalize(), _seen(kind, slice(None)).finalize(), "rows overwritten after update")


def check_observers_divide(quantizer: Quantizer) -> None:
    """`divided` gives the statistic of divided inputs; where a statistic holds rows, their order is free."""
    scale = torch.linspace(0.25, 4, WIDTH)
    for kind in quantizer.observers:
        divided = kind.divided(_seen(kind, slice(None)).finalize(), scale)
        observer = kind()
        observer.update(_rows() / scale, _importance())
        _require_equal(kind, _ordered(divided), _ordered(observer.finalize()), f"inputs divided by {scale[0]:g}..{scale[-1]:g}")


def check_observers_leave_the_statistic(quantizer: Quantizer) -> None:
    """`divided` works on a copy: linears that are not scaled go on using the statistic."""
    for kind in quantizer.observers:
        statistic = _seen(kind, slice(None)).finalize()
        before = statistic.clone()
        kind.divided(statistic, torch.full((WIDTH,), 2.0))
        _require_equal(kind, statistic, before, "a statistic after it was divided")


def _rows() -> Tensor:
    """[64, 24], columns of magnitudes from 0.1 to 10; new at each call."""
    return normal(PARTS[-1].stop, WIDTH, seed=50) * torch.logspace(-1, 1, WIDTH)


def _importance() -> Tensor:
    return normal(PARTS[-1].stop, seed=51).abs() + 0.1


def _seen(kind: type[Observer], part: slice) -> Observer:
    observer = kind()
    observer.update(_rows()[part], _importance()[part])
    return observer


def _each(kind: type[Observer]) -> Iterator[Observer]:
    return (_seen(kind, part) for part in PARTS)


def _ordered(statistic: Tensor) -> Tensor:
    """A statistic of one row per input row, in the order of its first column; any other as it is."""
    if statistic.shape == (PARTS[-1].stop, WIDTH):
        return statistic[statistic[:, 0].argsort()]
    return statistic


def _require_equal(kind: type[Observer], found: Tensor, expected: Tensor, what: str) -> None:
    if found.shape != expected.shape:
        raise CheckFailure(f"observer {kind.name!r}, {what}: {list(found.shape)}, expected {list(expected.shape)}")
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    if not error <= ROUNDING:
        raise CheckFailure(
            f"observer {kind.name!r}, {what}: off by {error:.2g} of the largest number, {ROUNDING:.2g} is rounding"
        )
