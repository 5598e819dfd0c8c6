"""The distance between two distributions over a vocabulary.

In float64: float32 rounds what logits that are nearly equal have lost to either side of 0.
"""

from __future__ import annotations

from torch import Tensor


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the natural logarithms of the softmax of logits [..., vocabulary] of any float type, in float64."""
    return logits.double().log_softmax(-1)


def kl_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Return KL(expected || found) in nats, never below 0, of `log_probabilities` [..., vocabulary]: [...]."""
    return (expected.exp() * (expected - found)).sum(-1).clamp(min=0)
