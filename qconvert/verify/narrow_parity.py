"""Parity of a graph that computes in float16 or bfloat16: not bit by bit, but what its outputs are used for is the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qconvert.errors import UsageError
from qconvert.execution.divergence import kl_divergence
from qconvert.ir.report import Parity
from qconvert.ir.task import Task
from qconvert.ort.compare import largest_difference
from qconvert.verify.attempt import NOT_COMPARABLE, attempt

SMALLEST_COSINE = 0.999
LARGEST_KL = 1e-3

Pairs = Sequence[tuple[np.ndarray[Any, Any], ...]]


def narrow_parity(target: str, task: Task, compare: Callable[[], Pairs], *, in_float16: bool = False) -> Parity:
    """Measure the smallest cosine of any output, and for decoders the mean KL(reference || output) over positions, in nats.

    compare: gives (output, reference) pairs, see ort.compare.compared. A graph that can't be run has failed.

    Raises UsageError QC-CUDA-004 for a graph in float16 whose numbers do not fit into it.
    """
    return attempt(target, lambda: _judged(target, task, compare(), in_float16))


def overflow(target: str, data: str) -> UsageError:
    """Return the error QC-CUDA-004 for a graph in float16 that gives NaN or infinity where float32 does not. data: what for."""
    return UsageError(
        "QC-CUDA-004",
        f"on {target}, NaN or infinity comes out of the graph for {data}, and not in float32: activations leave the range of "
        f"float16, which ends at {torch.finfo(torch.float16).max:.0f}",
        hint="write cuda_dtype: bfloat16 into the recipe, whose range is that of float32",
    )


def _judged(target: str, task: Task, pairs: Pairs, in_float16: bool) -> Parity:
    error = max(largest_difference(found, reference) for found, reference in pairs)
    if error == float("inf"):
        if in_float16 and all(found.shape == wanted.shape and np.isfinite(wanted).all() for found, wanted in pairs):
            raise overflow(target, "what its parity is checked on")
        return Parity(target=target, status="failed", reason=NOT_COMPARABLE)
    cosine = min(_cosine(found, reference) for found, reference in pairs)
    kl = _mean_kl(pairs) if task.generates else None
    reasons = [
        f"{name} {value:.2g}, the limit is {limit:g}"
        for name, value, limit, kept in (
            ("cosine", cosine, SMALLEST_COSINE, cosine >= SMALLEST_COSINE),
            ("KL", kl or 0.0, LARGEST_KL, (kl or 0.0) <= LARGEST_KL),
        )
        if not kept
    ]
    return Parity(
        target=target,
        status="failed" if reasons else "passed",
        max_relative_error=error,
        cosine=cosine,
        kl=kl,
        reason="; ".join(reasons) or None,
    )


def _cosine(found: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    a, b = (torch.from_numpy(np.asarray(x, np.float64)).flatten() for x in (found, reference))
    if torch.equal(a, b):
        return 1.0
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0, eps=1e-30))


def _mean_kl(pairs: Pairs) -> float:
    """pairs: logits [..., vocabulary]."""
    each = []
    for found, reference in pairs:
        logits, expected = (torch.from_numpy(np.asarray(x, np.float64)) for x in (found, reference))
        each.append(kl_divergence(expected, logits).flatten())
    return float(torch.cat(each).mean())
