"""The built-in estimators of ranges, each against numpy on the raw values, or a worked example."""

from __future__ import annotations

import time
from dataclasses import astuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from qconvert.ir.distribution import Distribution, ValueRange
from qconvert.plugin.host.contract import choose_range
from qconvert.plugin.range_estimator import RangeEstimator
from qconvert.range_estimators.kl import KL, divergences
from qconvert.range_estimators.min_max import MinMax
from qconvert.range_estimators.moving_average import MovingAverage
from qconvert.range_estimators.mse import MSE
from qconvert.range_estimators.percentile import Percentile

GENERATOR = torch.Generator().manual_seed(0)
NORMAL = torch.randn(40_000, generator=GENERATOR)
OUTLIER = torch.tensor([100.0])
VALUES = {
    "normal": NORMAL,
    "outlier": torch.cat([NORMAL, OUTLIER]),
    "outliers-on-both-sides": torch.cat([NORMAL, OUTLIER, -0.9 * OUTLIER]),
    "relu": NORMAL.relu(),
    "relu-outlier": torch.cat([NORMAL.relu(), OUTLIER]),
    "gelu": torch.nn.functional.gelu(2 * NORMAL),
    "cubes": NORMAL**3,
    "negative-only": -NORMAL.abs() - 1,
    "positive-only": NORMAL.abs() + 0.5,
    "integers": torch.arange(-3, 200).float(),
    "constant": torch.full((9,), 3.3),
    "constant-negative": torch.full((9,), -3.3),
    "two-values": torch.tensor([0.0, 1.0]),
    "zeros": torch.zeros(9),
    "tiny": NORMAL * 1e-40,
    "huge": NORMAL * 5e37,
    "mostly-one-bin": torch.cat([NORMAL * 1e-3, 30 * OUTLIER]),
}
ESTIMATORS: list[RangeEstimator] = [MinMax(), MovingAverage(), Percentile(), MSE(), KL()]


def chosen(estimator: RangeEstimator, values: Tensor, codes: int = 256, *, symmetric: bool = False) -> ValueRange:
    return choose_range(estimator, Distribution.of(values), codes, symmetric, "input")


def squared_error(values: Tensor, found: ValueRange, codes: int, *, symmetric: bool) -> float:
    """What quantizing and dequantizing the values themselves loses."""
    x = values.double().numpy()
    if symmetric:
        highest = codes / 2 - 1
        step, lowest = found.high / highest, -highest
    else:
        step = (found.high - found.low) / (codes - 1)
        lowest = -np.rint(-found.low / step)
        highest = lowest + codes - 1
    return float(((x - step * np.clip(np.rint(x / step), lowest, highest)) ** 2).mean())


@pytest.mark.parametrize("codes", [256, 65536])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator.name)
def test_every_estimator_keeps_the_contract(estimator: RangeEstimator, values: Tensor, symmetric: bool, codes: int) -> None:
    found = chosen(estimator, values, codes, symmetric=symmetric)
    assert found.low <= 0 <= found.high
    assert (found.low < found.high) == bool(values.any())
    assert chosen(estimator, values, codes, symmetric=symmetric) == found


def test_values_that_are_zero_have_no_range() -> None:
    for estimator in ESTIMATORS:
        assert repr(chosen(estimator, torch.zeros(3), symmetric=True)) == "ValueRange(low=0.0, high=0.0)"


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator.name)
def test_a_constant_loses_nothing_but_to_rounding(estimator: RangeEstimator) -> None:
    assert astuple(chosen(estimator, VALUES["constant"])) == pytest.approx((0, 3.3))
    assert astuple(chosen(estimator, VALUES["constant-negative"])) == pytest.approx((-3.3, 0))


# --- min-max, moving-average ---


def test_min_max_is_all_that_was_seen() -> None:
    assert chosen(MinMax(), torch.tensor([-1.5, 2.5])) == ValueRange(-1.5, 2.5)
    assert chosen(MinMax(), torch.tensor([-1.5, 2.5]), symmetric=True) == ValueRange(-2.5, 2.5)
    assert chosen(MinMax(), torch.tensor([1.5, 2.5])) == ValueRange(0, 2.5)


def test_the_moving_average_is_that_of_batches_in_order() -> None:
    first, *others = (Distribution.of(torch.tensor(batch)) for batch in ([-1.0, 2.0], [-3.0, 1.0], [-2.0, 8.0]))
    seen = first.merged(others[0]).merged(others[1])
    low = -1 + 0.1 * (-3 + 1)  # -1.2
    low += 0.1 * (-2 - low)
    high = 2 + 0.1 * (1 - 2)  # 1.9
    high += 0.1 * (8 - high)
    found = MovingAverage(0.1).choose(seen, 256, symmetric=False)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert MovingAverage(0.1).choose(seen, 256, symmetric=True).high == pytest.approx(high)
    assert MovingAverage(1.0).choose(seen, 256, symmetric=False) == ValueRange(-2, 8)


def test_the_moving_average_is_that_of_torch() -> None:
    from torch.ao.quantization import MovingAverageMinMaxObserver

    batches = [batch * scale for batch, scale in zip(NORMAL[:800].split(100), range(1, 9), strict=True)]
    observer = MovingAverageMinMaxObserver(averaging_constant=0.05)
    seen = Distribution.of(batches[0])
    observer(batches[0])
    for batch in batches[1:]:
        observer(batch)
        seen = seen.merged(Distribution.of(batch))
    found = MovingAverage(0.05).choose(seen, 256, symmetric=False)
    assert (found.low, found.high) == pytest.approx((float(observer.min_val), float(observer.max_val)), rel=1e-5)


# --- percentile ---


def quantile(values: Tensor, percent: float) -> float:
    """The smallest of the values up to which so many of them lie."""
    rank = int(np.ceil(round(percent * len(values) / 100, 6)))
    return float(values.sort().values[max(rank, 1) - 1])


@pytest.mark.parametrize("percentile", [50, 90, 99.9, 99.99, 100])
@pytest.mark.parametrize("values", [NORMAL, NORMAL**3, NORMAL.abs() + 0.5, VALUES["outlier"]], ids=range(4))
def test_percentiles_are_those_of_the_values_within_a_bin(values: Tensor, percentile: float) -> None:
    seen = Distribution.of(values)
    cut = (100 - percentile) / 2
    low, high = quantile(values, cut), quantile(values, 100 - cut)
    found = Percentile(percentile).choose(seen, 256, symmetric=False)
    assert (found.low, found.high) == pytest.approx((low, high), abs=seen.width)
    largest = quantile(values.abs(), percentile)
    assert Percentile(percentile).choose(seen, 256, symmetric=True).high == pytest.approx(largest, abs=seen.width)


def test_a_percentile_lies_between_the_edges_of_a_bin() -> None:
    seen = Distribution.of(torch.tensor([4095.0, *[0.0] * 4]))  # bins of 1, four fifths of the values in the first
    assert seen.width == 1
    assert Percentile(20).choose(seen, 256, symmetric=True).high == pytest.approx(0.25)


# --- mse ---


@pytest.mark.parametrize("codes", [16, 256])
@pytest.mark.parametrize("name", ["normal", "outlier", "relu", "relu-outlier", "gelu", "cubes", "negative-only"])
def test_the_range_of_mse_is_as_good_as_the_best_that_brute_force_finds(name: str, codes: int) -> None:
    values = VALUES[name][::4]
    values = torch.cat([values, VALUES[name][-1:]])
    seen = Distribution.of(values)
    for symmetric in (False, True):
        found = choose_range(MSE(), seen, codes, symmetric, "input")
        ratios = np.geomspace(0.02, 1, 30)
        if symmetric:
            tried = [ValueRange(-seen.largest * ratio, seen.largest * ratio) for ratio in ratios]
        else:
            lows = [min(seen.minimum, 0) * ratio for ratio in ratios] if seen.minimum < 0 else [0.0]
            highs = [max(seen.maximum, 0) * ratio for ratio in ratios] if seen.maximum > 0 else [0.0]
            tried = [ValueRange(low, high) for low in lows for high in highs]
        least = min(squared_error(values, each, codes, symmetric=symmetric) for each in tried)
        assert squared_error(values, found, codes, symmetric=symmetric) <= 1.02 * least


def test_mse_clips_a_little_of_normal_values_and_nothing_with_16_bits() -> None:
    lost = squared_error(NORMAL, chosen(MSE(), NORMAL), 256, symmetric=False)
    assert lost < 0.95 * squared_error(NORMAL, chosen(MinMax(), NORMAL), 256, symmetric=False)
    assert chosen(MSE(), NORMAL, 65536) == chosen(MinMax(), NORMAL)


def test_mse_searches_both_ends() -> None:
    million = torch.cat([torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0, -90.0])])
    found = chosen(MSE(), million)
    assert -60 < found.low < -10
    assert 10 < found.high < 60
    assert 100 - found.high == pytest.approx(90 + found.low, rel=0.2)  # what either clipped value loses is balanced


def test_mse_is_quick() -> None:
    seen = Distribution.of(VALUES["outliers-on-both-sides"])
    seconds = []
    for _ in range(5):
        began = time.process_time()
        MSE().choose(seen, 256, symmetric=False)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.2


# --- kl ---


def kl_by_hand(bins: list[int], i: int, levels: int) -> float:
    """KL(P || Q) in the steps of S. Migacz's slides."""
    p: npt.NDArray[np.float64] = np.array(bins[:i], dtype=float)
    p[-1] += sum(bins[i:])
    of_level = [int(np.floor(place * levels / i)) for place in range(i)]
    q = np.zeros(i)
    for level in range(levels):
        members = [place for place in range(i) if of_level[place] == level and bins[place] > 0]
        for place in members:
            q[place] = sum(bins[each] for each in members) / len(members)
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def test_kl_is_that_of_the_example_in_the_slides() -> None:
    bins = [1, 0, 2, 3, 5, 3, 1, 7]
    p = np.array(bins) / 22
    q = np.array([2, 0, 2, 2, 4, 4, 4, 4]) / 22  # two levels: 1 + 0 + 2 + 3 = 6 over three bins, 5 + 3 + 1 + 7 = 16 over four
    expected = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    assert divergences(np.array(bins), 8, 2).tolist() == pytest.approx([expected])
    assert kl_by_hand(bins, 8, 2) == pytest.approx(expected)


def test_kl_is_that_of_the_formula_for_every_threshold() -> None:
    bins = [9, 4, 7, 5, 3, 2, 4, 1, 2, 1, 1, 3]
    expected = [kl_by_hand(bins, i, 4) for i in range(4, len(bins) + 1)]
    assert divergences(np.array(bins), 4, 4).tolist() == pytest.approx(expected)


def test_a_last_bin_that_is_empty_counts_as_holding_one_number() -> None:
    bins = [9, 4, 7, 5, 0, 0, 2]
    expected = [kl_by_hand([*bins[: i - 1], max(bins[i - 1], 1), *bins[i:]], i, 3) for i in range(3, len(bins) + 1)]
    assert divergences(np.array(bins), 3, 3).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("name", ["outlier", "outliers-on-both-sides", "relu-outlier"])
def test_kl_clips_an_outlier(name: str, symmetric: bool) -> None:
    found = chosen(KL(), VALUES[name], symmetric=symmetric)
    assert 3 < found.high < 10
    assert found.low > -10


def test_kl_keeps_what_the_document_says_of_an_outlier() -> None:
    found = chosen(KL(), VALUES["outlier"], symmetric=True)
    assert round(found.high, 1) == 4.2


def test_kl_keeps_most_of_values_that_are_far_from_zero() -> None:
    found = chosen(KL(), VALUES["negative-only"])
    assert found.low < -4


def test_kl_is_cut_to_what_was_seen() -> None:
    values = torch.cat([VALUES["gelu"], OUTLIER])
    found = chosen(KL(), values)
    assert found.low == pytest.approx(float(values.min()))
    assert found.high < 20


@pytest.mark.parametrize("name", ["normal", "outlier", "cubes"])
def test_kl_with_16_bits_is_min_max(name: str) -> None:
    for symmetric in (False, True):
        expected = chosen(MinMax(), VALUES[name], 65536, symmetric=symmetric)
        assert chosen(KL(), VALUES[name], 65536, symmetric=symmetric) == expected
