"""KL: the threshold up to which codes keep most of what the distribution of the values tells.

    T = i * width,   i = argmin KL(P || Q)

over the histogram of magnitudes, for each i from the number of levels on, empty bins beside 0 not counted. P is the first i
bins, with all that lies beyond added to the last of them. Q is the first i bins without that, joined to as many levels as there
are codes for magnitudes, the count of each level spread again over those of its bins that hold something. Both are divided by
their sums. There are codes / 2 levels, or as many as codes where those are asymmetric and the values have one sign.

Where the last bin is empty and something lies beyond it, the divergence would be infinite, though that bin is empty by chance:
it then counts as holding one number. The bin at 0 counts as many as the one after it: 0 has a code in every range, and it, or
nearly that, is what activation functions put out most.

With 16 bits there are more codes than bins, and KL says nothing: the range is that of min-max. The same holds, with 8 bits, for
`quantize_static(calibrate_method=CalibrationMethod.Entropy)` of ONNX Runtime: its histogram has as many bins as levels, and it
never clips.

Source: S. Migacz, "8-bit Inference with TensorRT", GTC 2017; the bin at 0 and the levels of values with one sign are treated as
in NVIDIA's pytorch-quantization.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qconvert.ir.distribution import Distribution, ValueRange
from qconvert.plugin import hookimpl
from qconvert.plugin.range_estimator import RangeEstimator

Counts = npt.NDArray[np.int64]


@hookimpl
def register_range_estimators() -> list[type[RangeEstimator]]:
    """Register the estimator of this module."""
    return [KL]


@dataclass(frozen=True)
class KL(RangeEstimator):
    """The range whose codes have the distribution nearest to that of the values, in Kullback-Leibler divergence."""

    name = "kl"

    def choose(self, seen: Distribution, codes: int, *, symmetric: bool) -> ValueRange:
        """Return [-T, T]; asymmetric: cut to what was seen."""
        has_one_sign = seen.minimum >= 0 or seen.maximum <= 0
        levels = codes if has_one_sign and not symmetric else codes // 2
        bins = seen.magnitudes.numpy()
        bins[0] = bins[1]
        held = np.flatnonzero(bins)
        threshold = seen.largest
        if len(held) and held[-1] >= (start := held[0] + levels):
            least = start + int(divergences(bins[: held[-1] + 1], start, levels).argmin())
            threshold = float(least * seen.width)
        return seen.clipped(-threshold, threshold, symmetric=symmetric)


def divergences(bins: Counts, start: int, levels: int) -> npt.NDArray[np.float64]:
    """Return KL(P || Q) in nats for each i from `start` to len(bins): [len(bins) - start + 1].

    bins: counts of magnitudes, the last of them above 0.
    start: at least the number of levels, and so large that one of the first `start` bins holds something.

    All i are computed at once, from sums over the first bins: P and Q of one i and of another differ only in where levels end.
    """
    i = np.arange(start, len(bins) + 1)
    inside, held, information = _sums(bins), _sums(bins > 0), _sums(_x_log_x(bins))
    outside, last = inside[-1] - inside[i], bins[i - 1]
    added = np.where((last == 0) & (outside > 0), 1, 0)  # to a last bin that is empty
    ends = -(-np.arange(levels + 1) * i[:, None] // levels)  # bin j is of the level floor(j * levels / i): [i, levels + 1]
    of_level, held_of_level = np.diff(inside[ends]), np.diff(held[ends])
    of_level[:, -1] += added
    held_of_level[:, -1] += added
    log_q = np.log(np.maximum(of_level, 1) / np.maximum(held_of_level, 1))  # of a bin that holds something, not yet divided
    sum_p, sum_q = inside[-1] + added, inside[i] + added
    p_log_p = information[i] - _x_log_x(last) + _x_log_x(last + added + outside)
    p_log_q = (of_level * log_q).sum(1) + outside * log_q[:, -1]
    found: npt.NDArray[np.float64] = (p_log_p - p_log_q) / sum_p - np.log(sum_p) + np.log(sum_q)
    return found


def _sums(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the sums of the first 0, 1, ... values: [n + 1]."""
    return np.concatenate([[0], np.cumsum(values)])


def _x_log_x(values: Counts) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = values.astype(np.float64) * np.log(np.maximum(values, 1))
    return found
