"""Observers: mergeable accumulators over the inputs of a linear."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor


class Observer(ABC):
    """Accumulates one statistic over input rows.

    Rows seen in one call or in several, in one observer or in two that are merged, must give the same result
    (up to float rounding), so that batches can be of any size.
    """

    name: ClassVar[str]

    @abstractmethod
    def update(self, rows: Tensor) -> None:
        """Take in `rows` [n, in] float32; padding is already left out."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in all that `other` has seen."""

    @abstractmethod
    def finalize(self) -> Tensor:
        """The statistic. Called once, after at least one row."""

    @staticmethod
    @abstractmethod
    def divided(statistic: Tensor, scale: Tensor) -> Tensor:
        """The statistic as it were if every input row had been divided by `scale` [in]."""


class AbsMax(Observer):
    """Largest magnitude of each input column: [in]."""

    name = "absmax"

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        seen = rows.abs().amax(0)
        self.value = seen if self.value is None else torch.maximum(self.value, seen)

    def merge(self, other: Self) -> None:
        if other.value is not None:
            self.value = other.value if self.value is None else torch.maximum(self.value, other.value)

    def finalize(self) -> Tensor:
        assert self.value is not None
        return self.value

    @staticmethod
    def divided(statistic: Tensor, scale: Tensor) -> Tensor:
        return statistic / scale


class Gram(Observer):
    """Mean of x x^T over the rows: [in, in]. The output error of a weight change D is tr(D Gram D^T) per row."""

    name = "gram"

    def __init__(self) -> None:
        self.rows = 0
        self.total: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        product = rows.T @ rows
        self.rows += rows.shape[0]
        self.total = product if self.total is None else self.total.add_(product)

    def merge(self, other: Self) -> None:
        if other.total is not None:
            self.rows += other.rows
            self.total = other.total.clone() if self.total is None else self.total + other.total

    def finalize(self) -> Tensor:
        assert self.total is not None
        return self.total / self.rows

    @staticmethod
    def divided(statistic: Tensor, scale: Tensor) -> Tensor:
        return statistic / scale / scale[:, None]
