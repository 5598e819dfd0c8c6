"""Histograms that a report holds, and how many of them: small enough for a file that people open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Bins of one histogram, and histograms of one kind in a report: those of a layer take 0.6 kB of JSON, at most 1 kB, and so all
# of them half a megabyte.
MOST_BINS, MOST_HISTOGRAMS = 64, 512


@dataclass(frozen=True, slots=True)
class Histogram:
    """The distribution of numbers. counts: how many lie in [low + k * width, low + (k + 1) * width), k from 0.

    width is a power of two, and low a multiple of it. The first and the last bin are not empty.
    """

    low: float
    width: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightHistogram:
    """The weights of one layer before and after, in the same bins; low and width are those of `Histogram`.

    before: of the float weights as the quantizer was given them, with the scales that were folded into them.
    after: of what their codes stand for.
    step: every how many rows were counted, from the first on: 1 where all of them were.
    minimum, maximum: of all float weights.
    """

    low: float
    width: float
    before: tuple[int, ...]
    after: tuple[int, ...]
    step: int
    minimum: float
    maximum: float


def with_histogram(losses: Sequence[float]) -> list[bool]:
    """Return which of several things keep their histogram: all, or the MOST_HISTOGRAMS that have lost most.

    losses: of each; of equal ones the first are kept.
    """
    worst = sorted(range(len(losses)), key=lambda index: -losses[index])
    kept = set(worst[:MOST_HISTOGRAMS])
    return [index in kept for index in range(len(losses))]


def which_have_one(histograms: Sequence[Histogram | WeightHistogram | None], things: str, loss: str) -> str | None:
    """Word which things have a histogram where not all have: "512 of 560 layers, those with the largest relative_error".

    loss: the name of what `with_histogram` was given. None where all have one, or none has.
    """
    kept = sum(each is not None for each in histograms)
    return f"{kept} of {len(histograms)} {things}, those with the largest {loss}" if 0 < kept < len(histograms) else None
