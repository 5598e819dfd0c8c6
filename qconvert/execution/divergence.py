"""The distance between two distributions over a vocabulary.

In float64: float32 rounds what logits that are nearly equal have lost to either side of 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Logits that are converted at once: what is made of them stays in the processor's cache. With 128 rows of 49152 in place of 8,
# the same took three times as long.
AT_ONCE = 400_000


class Distributions(NamedTuple):
    """Two distributions for each position, compared; all are float64 [positions].

    kl: KL(expected || found) in nats, never below 0.
    expected_norm, found_norm: the logarithm of the sum of exp(logit): a logit less that is the logarithm of a probability.
    largest: the largest |found - expected| of a logit.
    """

    kl: Tensor
    expected_norm: Tensor
    found_norm: Tensor
    largest: Tensor


def compare_logits(expected: Tensor, found: Tensor) -> Distributions:
    """Compare the distributions that logits [positions, vocabulary] of any float type stand for."""
    rows = max(1, AT_ONCE // max(1, expected.shape[-1]))
    parts = [_compared(*part) for part in zip(expected.split(rows), found.split(rows), strict=True)]
    return Distributions(*map(torch.cat, zip(*parts, strict=True)))


def kl_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Return KL(expected || found) in nats, float64 and never below 0, of logits [..., vocabulary]: [...]."""
    vocabulary = expected.shape[-1]
    return compare_logits(expected.reshape(-1, vocabulary), found.reshape(-1, vocabulary)).kl.reshape(expected.shape[:-1])


def _compared(expected: Tensor, found: Tensor) -> Distributions:
    expected, found = expected.double(), found.double()
    difference = expected - found
    largest = torch.stack(torch.aminmax(difference, dim=-1)).abs().amax(0)
    weights, total, expected_norm = _exponentials(expected)
    _, _, found_norm = _exponentials(found)
    # The sum of p (log p - log q) is that of p (logit - logit'), less what the norms differ by.
    shifted = torch.linalg.vecdot(weights, difference) / total
    return Distributions((shifted - expected_norm + found_norm).clamp(min=0), expected_norm, found_norm, largest)


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(exp(logits) [positions, vocabulary] in relation to the largest, their sum, the logarithm of that of exp(logits))."""
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    total = weights.sum(-1)
    return weights, total, total.log() + top.squeeze(-1)
