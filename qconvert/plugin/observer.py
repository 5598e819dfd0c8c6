"""Observers: mergeable accumulators over the inputs of a linear."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from qconvert.ir.large_tensors import zeros

GRAM_BLOCK = 256  # columns of a Gram matrix that are multiplied at once
SAMPLED_ROWS = 256


class Observer(ABC):
    """Accumulates one statistic over input rows.

    Rows seen in one call or in several, in one observer or in two that are merged, must give the same result
    (up to float rounding), so that batches can be of any size.

    importance: how much a squared error of the layer's output counts at each row: the reciprocal mean square of the block's
    output there. Errors are added to that output and the next norm divides by its magnitude, so it is relative errors that
    hurt; a few tokens with massive activations would outweigh all others without it. 1 where there is no such output.
    """

    name: ClassVar[str]

    @abstractmethod
    def update(self, rows: Tensor, importance: Tensor) -> None:
        """Take in `rows` [n, in] float32, padding already left out, and their `importance` [n]."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in all that `other`, of the same kind, has seen, and leave it as it is. Either may have seen nothing.

        Each chunk of samples has an observer of its own; these are merged in the order of the chunks into one that began empty.
        """

    @abstractmethod
    def finalize(self) -> Tensor:
        """Return the statistic. Called once, after at least one row."""

    @staticmethod
    @abstractmethod
    def divided(statistic: Tensor, scale: Tensor) -> Tensor:
        """Return the statistic as it were if every input row had been divided by `scale` [in]."""


class AbsMax(Observer):
    """Largest magnitude of each input column: [in]."""

    name = "absmax"

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def update(self, rows: Tensor, importance: Tensor) -> None:
        """Raise the maxima to the magnitudes of `rows`; importance does not matter here."""
        seen = rows.abs().amax(0)
        self.value = seen if self.value is None else torch.maximum(self.value, seen)

    def merge(self, other: Self) -> None:
        """Raise the maxima to those of `other`."""
        if other.value is not None:
            self.value = other.value if self.value is None else torch.maximum(self.value, other.value)

    def finalize(self) -> Tensor:
        """Return the maxima, [in]."""
        assert self.value is not None
        return self.value

    @staticmethod
    def divided(statistic: Tensor, scale: Tensor) -> Tensor:
        """Return the maxima of the divided inputs: [in] / scale."""
        return statistic / scale


class Gram(Observer):
    """Mean of importance * x x^T over the rows: [in, in]. The output error of a weight change D is tr(D Gram D^T) per row.

    A wide matrix is large, so there is one of it: rows that are fewer than it has wait until they are merged into that one.
    """

    name = "gram"

    def __init__(self) -> None:
        self.rows = 0
        self.total: Tensor | None = None
        self.waiting: list[Tensor] = []

    def update(self, rows: Tensor, importance: Tensor) -> None:
        """Take in importance * x x^T of every row."""
        self.rows += len(rows)
        self.waiting.append(rows * importance.sqrt()[:, None])
        if sum(map(len, self.waiting)) >= rows.shape[1]:
            self._multiply()

    def merge(self, other: Self) -> None:
        """Add the sums and row counts of `other`."""
        self._multiply()
        self.rows += other.rows
        if other.total is not None:
            self._sum(other.total).add_(other.total)
        for rows in other.waiting:
            self._add(rows)

    def finalize(self) -> Tensor:
        """Return the mean, [in, in], its lower half mirrored from the upper."""
        self._multiply()
        assert self.total is not None
        for start in range(0, len(self.total), GRAM_BLOCK):
            block, after = slice(start, start + GRAM_BLOCK), slice(start + GRAM_BLOCK, None)
            corner = self.total[block, block].triu()
            self.total[block, block] = corner + corner.triu(1).T
            self.total[after, block] = self.total[block, after].T
        return self.total.div_(self.rows)

    def _multiply(self) -> None:
        """Add the rows that wait."""
        for rows in self.waiting:
            self._add(rows)
        self.waiting.clear()

    def _add(self, rows: Tensor) -> None:
        """Add x x^T of rows that were multiplied by the roots of their importance, its upper blocks only."""
        total = self._sum(rows)
        for start in range(0, rows.shape[1], GRAM_BLOCK):  # what lies below the diagonal follows from symmetry, in `finalize`
            block = slice(start, start + GRAM_BLOCK)
            total[block, start:] += rows[:, block].T @ rows[:, start:]

    def _sum(self, like: Tensor) -> Tensor:
        """Return the sum, 0 at first, for inputs of the same width and device."""
        if self.total is None:
            self.total = zeros(like.shape[1], like.shape[1], device=like.device)
        return self.total

    @staticmethod
    def divided(statistic: Tensor, scale: Tensor) -> Tensor:
        """Return the matrix of the divided inputs: both its rows and its columns are divided by `scale`."""
        return torch.div(statistic, scale, out=zeros(*statistic.shape, device=statistic.device)).div_(scale[:, None])


class SampledRows(Observer):
    """Some of the rows, each times the root of its importance: [n, in], n <= SAMPLED_ROWS.

    Whatever scales with its row, as an error of dynamic activation quantization does, has the row's importance in it.
    Which rows depends on nothing but their content: those with the smallest hash.
    """

    name = "rows"

    def __init__(self) -> None:
        self.hashes: Tensor | None = None
        self.rows: Tensor | None = None

    def update(self, rows: Tensor, importance: Tensor) -> None:
        """Keep the rows with the smallest hashes among these and those kept so far, each times the root of its importance."""
        self._keep(_hashes(rows), rows * importance.sqrt()[:, None])

    def merge(self, other: Self) -> None:
        """Keep the rows with the smallest hashes of both."""
        if other.hashes is not None and other.rows is not None:
            self._keep(other.hashes, other.rows)

    def _keep(self, hashes: Tensor, rows: Tensor) -> None:
        if self.hashes is not None and self.rows is not None:
            hashes, rows = torch.cat([self.hashes, hashes]), torch.cat([self.rows, rows])
        order = hashes.argsort(stable=True)[:SAMPLED_ROWS]
        self.hashes, self.rows = hashes[order], rows[order]

    def finalize(self) -> Tensor:
        """Return the rows that were kept, [n, in] with n <= SAMPLED_ROWS."""
        assert self.rows is not None
        return self.rows

    @staticmethod
    def divided(statistic: Tensor, scale: Tensor) -> Tensor:
        """Return the rows as divided inputs, [n, in] / scale."""
        return statistic / scale


def _hashes(rows: Tensor) -> Tensor:
    """One int64 per row, a polynomial in the bits of its values; integer overflow wraps."""
    bits = rows.contiguous().view(torch.int32).to(torch.int64)
    powers = torch.full((rows.shape[1],), 6364136223846793005, dtype=torch.int64, device=rows.device).cumprod(0)
    mixed = (bits * powers).sum(1)
    return (mixed ^ (mixed >> 29)) * 2862933555777941757
