"""Distribution: the histogram is what numpy counts, and the same in whatever order batches are merged."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qconvert.ir.distribution import BINS, Distribution, ValueRange

GENERATOR = torch.Generator().manual_seed(0)
NORMAL = torch.randn(50_000, generator=GENERATOR)
TINY = torch.tensor([2.0**-149, -(2.0**-140), 3 * 2.0**-149, 0.0])
VALUES = {
    "normal": NORMAL,
    "negative-only": -NORMAL.abs() - 1,
    "positive-only": NORMAL.abs() + 0.5,
    "tiny": NORMAL * 1e-30,
    "subnormal": TINY,
    "huge": NORMAL * 7e37,
    "small-beside-huge": torch.cat([torch.tensor([3e38]), TINY]),
    "constant": torch.full((7,), 3.3),
    "constant-negative": torch.full((7,), -0.1),
    "a-power-of-two": torch.tensor([8.0, 8.0]),
    "minus-a-power-of-two": torch.tensor([-8.0, 1.0]),
    "zeros": torch.zeros(5),
    "one": torch.tensor([1.5]),
    "integers": torch.arange(-300, 300).float(),
    "float16": NORMAL.half(),
    "bfloat16": NORMAL.bfloat16(),
    "float64": NORMAL.double() * 1e-60,
    "a-transposed-matrix": NORMAL.reshape(500, 100).T,
}


def by_hand(values: Tensor, width: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    bins = np.floor(values.double().reshape(-1).numpy() / width).astype(np.int64)
    return np.bincount(bins + BINS, minlength=2 * BINS)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_a_histogram_is_what_numpy_counts(values: Tensor) -> None:
    seen = Distribution.of(values)
    assert seen.count == values.numel() == int(seen.counts.sum())
    assert seen.zeros == int((values == 0).sum())
    assert (seen.minimum, seen.maximum) == (float(values.min()), float(values.max()))
    assert (seen.batch_minima, seen.batch_maxima) == ((seen.minimum,), (seen.maximum,))
    assert seen.counts.dtype == torch.int64
    assert np.array_equal(seen.counts.numpy(), by_hand(values, seen.width))


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_width_is_the_smallest_power_of_two_with_which_all_values_fit(values: Tensor) -> None:
    seen = Distribution.of(values)
    assert math.frexp(seen.width)[0] == 0.5
    assert -BINS * seen.width <= seen.minimum
    assert seen.maximum < BINS * seen.width
    narrower = seen.width / 2
    if seen.width > 2.0**-149:
        assert seen.minimum < -BINS * narrower or seen.maximum >= BINS * narrower


def test_values_of_zero_alone_have_the_narrowest_bins() -> None:
    assert Distribution.of(VALUES["zeros"]).width == 2.0**-149


def test_edges_and_centers_are_those_of_the_counts() -> None:
    seen = Distribution.of(torch.tensor([-1.0, 0.0, 0.25, 0.999]))
    assert seen.width == 2.0**-12
    assert seen.edges.dtype == seen.centers.dtype == torch.float64
    assert (float(seen.edges[0]), float(seen.edges[BINS]), float(seen.edges[-1])) == (-1, 0, 1)
    assert torch.equal(seen.centers, (seen.edges[1:] + seen.edges[:-1]) / 2)
    assert seen.counts.nonzero().flatten().tolist() == [0, BINS, BINS + 1024, 2 * BINS - 5]


def test_magnitudes_join_both_sides() -> None:
    seen = Distribution.of(torch.tensor([-0.3, -0.1, 0.1, 0.3, 0.3]))
    held = seen.magnitudes.nonzero().flatten()
    assert held.tolist() == [int(0.1 / seen.width), int(0.3 / seen.width)]
    assert seen.magnitudes[held].tolist() == [2, 3]
    assert seen.largest == pytest.approx(0.3)


# --- merged ---

BATCHES = [NORMAL[:1000], NORMAL[1000:1500] * 1e3, torch.zeros(10), -NORMAL[:77].abs() * 1e-20, torch.tensor([5e5])]


@pytest.mark.parametrize("order", list(itertools.permutations(range(len(BATCHES))))[::7], ids=str)
def test_merging_gives_the_histogram_of_all_values_in_any_order(order: tuple[int, ...]) -> None:
    first, *others = (Distribution.of(BATCHES[place]) for place in order)
    merged = first
    for other in others:
        merged = merged.merged(other)
    whole = Distribution.of(torch.cat(BATCHES))
    assert torch.equal(merged.counts, whole.counts)
    assert (merged.width, merged.count, merged.zeros) == (whole.width, whole.count, whole.zeros)
    assert (merged.minimum, merged.maximum) == (whole.minimum, whole.maximum)
    assert merged.batch_minima == tuple(float(BATCHES[place].min()) for place in order)
    assert merged.batch_maxima == tuple(float(BATCHES[place].max()) for place in order)


def test_merging_may_join_in_groups() -> None:
    a, b, c, d, _ = map(Distribution.of, BATCHES)
    assert torch.equal(a.merged(b).merged(c.merged(d)).counts, d.merged(b.merged(a)).merged(c).counts)


def test_merging_leaves_both_as_they_were() -> None:
    one, other = Distribution.of(NORMAL), Distribution.of(NORMAL * 1e6)
    before = one.counts.clone(), other.counts.clone()
    one.merged(other)
    assert torch.equal(one.counts, before[0])
    assert torch.equal(other.counts, before[1])


# --- clipped ---


@pytest.mark.parametrize(
    ("low", "high", "symmetric", "expected"),
    [
        (-1, 2, False, (-1, 2)),
        (-9, 9, False, (-3, 5)),
        (-9, 9, True, (-5, 5)),
        (-2, 1, True, (-2, 2)),
        (7, 8, False, (5, 5)),
    ],
    ids=["within", "beyond", "beyond-symmetric", "the-wider-side", "outside"],
)
def test_a_range_is_cut_to_what_was_seen(low: float, high: float, symmetric: bool, expected: tuple[float, float]) -> None:
    seen = Distribution.of(torch.tensor([-3.0, 5.0]))
    assert seen.clipped(low, high, symmetric=symmetric) == ValueRange(*expected)
