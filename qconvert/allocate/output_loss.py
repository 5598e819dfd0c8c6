"""What the output of a model loses on samples, in the metric of a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qconvert.execution.divergence import kl_divergence
from qconvert.ir.task import Task

# How many standard errors lie between what samples lose and what others surely lose less than.
MARGIN = 2.0

Outputs = Sequence[np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class OutputLoss:
    """What is lost on average over samples, of the output that loses most.

    mean: KL in nats, or 1 - cosine. bound: with MARGIN standard errors on top, so that other samples lose less, too.
    """

    mean: float
    bound: float

    @classmethod
    def of(cls, losses: Tensor) -> OutputLoss:
        """Average losses [samples, outputs]."""
        mean = losses.mean(0)
        error = losses.std(0) / len(losses) ** 0.5 if len(losses) > 1 else torch.zeros_like(mean)
        bounds = mean + MARGIN * error
        worst = int(bounds.argmax())
        return cls(float(mean[worst]), float(bounds[worst]))


def sample_losses(found: Outputs, expected: Outputs, task: Task) -> Tensor:
    """Return what one sample loses: float64 [1], the mean KL of its tokens, for models that write text; else 1 - cosine of each
    output, [outputs], where a text encoder's vectors of tokens are averaged first, as verification does (verify/fidelity.py).
    """
    pairs = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(found, expected, strict=True)]
    if task.generates:
        return kl_divergence(pairs[0][1], pairs[0][0]).mean().reshape(1)
    return torch.stack([1 - _cosine(*(_vector(each, task) for each in pair)) for pair in pairs])


def _vector(output: Tensor, task: Task) -> Tensor:
    return (output.double().mean(1) if task.takes_text and output.ndim == 3 else output.double()).flatten()


def _cosine(found: Tensor, expected: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(found, expected, dim=0).clamp(max=1)
