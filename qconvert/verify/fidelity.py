"""Fidelity: the artifact against the float model, on evaluation data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from qconvert.execution.divergence import compare_logits
from qconvert.ir.batch import Batch, row_count, rows_of
from qconvert.ir.progress import Progress
from qconvert.ir.report import Fidelity
from qconvert.ir.task import Task
from qconvert.ort.compare import feed
from qconvert.ort.pieces import Run, each_run
from qconvert.ort.several import several
from qconvert.verify.finite import first_not_finite, require_finite_float


def measure_fidelity(  # noqa: PLR0913 - the last two are no part of what is compared with what
    artifact: Any,
    baseline: Any,
    batches: Sequence[Batch],
    task: Task,
    target: str,
    progress: Progress,
    *,
    decoding: Any = None,
    at_once: int = 1,
) -> Fidelity:
    """Run both sessions on the evaluation batches, one sample at a time, and compare.

    decoding: of an artifact with a body of its own for prompts, a session over the other one, whose loss is measured too.
    at_once: samples that are run and compared at the same time, each on a thread of its own.

    An artifact whose outputs are not finite has failed. Raises InputError QC-FLOAT-001 where the float model's are not.
    """
    by_token = task.generates
    sessions = [artifact] if decoding is None else [artifact, decoding]
    meters = [_meter(task) for _ in sessions]
    # Samples of one batch share a padded length; token models are run row by row to bound the logits in memory.
    parts = [part for batch in batches for part in (rows_of(batch) if by_token else [batch])]
    before = accumulate(map(row_count, parts), initial=0)
    floats = each_run(baseline, [feed(baseline, part) for part in parts], first=1, at_once=at_once)
    compare = partial(_compared, sessions, task)
    with _one_thread_each(at_once), closing(several(compare, zip(parts, floats, before, strict=False), at_once)) as found:
        for part, compared in zip(parts, found, strict=True):
            if isinstance(compared, int):
                reason = f"NaN or infinity comes out of it for evaluation sample {compared}, and not of the float model"
                return Fidelity(target=target, status="failed", reason=reason)
            for meter, more in zip(meters, compared, strict=True):
                meter.add(more)
            progress.advance(row_count(part))
    whole, *others = (meter.result(target) for meter in meters)
    return whole.model_copy(update={"kl_decode": others[0].kl}) if others else whole


def _compared(sessions: Sequence[Any], task: Task, sample: tuple[Batch, Run, int]) -> list[_Meter] | int:
    """A meter of one part for each session; or the number of the first sample, from 1, for which one gives no finite numbers.

    sample: the part, what runs the float model on it, and how many samples came before.
    """
    part, run_float, before = sample
    expected = torch.from_numpy(run_float()[0])
    require_finite_float(expected, part, "evaluation", before)
    meters = []
    for session in sessions:
        found = torch.from_numpy(session.run(None, feed(session, part))[0])
        row = first_not_finite(found, part)
        if row is not None:
            return before + row + 1
        meters.append(_meter(task))
        meters[-1].update(found, expected, part)
    return meters


@contextmanager
def _one_thread_each(at_once: int) -> Iterator[None]:
    """Let torch compute on the thread that calls it where several do so: threads that wait for each other would take cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if at_once == 1 else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _meter(task: Task) -> _Meter:
    return TokenMeter() if task.generates else _VectorMeter(task)


class _Meter(Protocol):
    """What counts the differences between outputs."""

    def update(self, found: Tensor, expected: Tensor, batch: Batch) -> None:
        """Count those of a batch."""

    def add(self, other: Any) -> None:
        """Count what another meter of the same kind has seen."""

    def result(self, target: str) -> Fidelity:
        """Return what was found on a target."""


class TokenMeter:
    """KL(float || artifact) in nats over all positions, top-1 agreement, and both perplexities."""

    def __init__(self) -> None:
        self.positions = self.predicted = 0
        self.kl = self.same = self.loss = self.loss_float = 0.0
        self.max_abs = 0.0

    def update(self, found: Tensor, expected: Tensor, batch: Batch) -> None:
        """Take in the logits of one row, found and expected [1, sequence, vocabulary]."""
        length = int(batch["attention_mask"][0].sum())
        # A decoder that has a source is given the text behind its start token: as many tokens.
        ids = batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"][0, :length]
        found, expected = found[0, :length], expected[0, :length]
        compared = compare_logits(expected, found)
        self.max_abs = max(self.max_abs, float(compared.largest.max()))
        self.kl += float(compared.kl.sum())
        self.same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        self.positions += length
        self.loss += _loss(found, compared.found_norm, ids)
        self.loss_float += _loss(expected, compared.expected_norm, ids)
        self.predicted += length - 1

    def add(self, other: TokenMeter) -> None:
        """Count what another meter has seen."""
        self.max_abs = max(self.max_abs, other.max_abs)
        for name in ("positions", "predicted", "kl", "same", "loss", "loss_float"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def result(self, target: str) -> Fidelity:
        """Return what was measured of all rows."""
        predicted = max(self.predicted, 1)
        return Fidelity(
            target=target,
            status="passed",
            kl=self.kl / self.positions,
            kl_decode=self.kl / self.positions,
            top1=self.same / self.positions,
            perplexity=math.exp(min(self.loss / predicted, 700.0)),
            perplexity_float=math.exp(min(self.loss_float / predicted, 700.0)),
            max_abs=self.max_abs,
        )


def _loss(logits: Tensor, norm: Tensor, ids: Tensor) -> float:
    """The cross entropy in nats, summed, of each of the tokens `ids` but the first. norm: see `compare_logits`."""
    given = logits[:-1].gather(1, ids[1:, None]).squeeze(1)
    return float((norm[:-1] - given).sum())


class _VectorMeter:
    """Mean cosine and largest difference; for classifiers also the share of rows with the same largest output.

    Text encoders are compared by the mean of their tokens' vectors where they give one for each, all else by its rows.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rows = 0
        self.cosine = self.max_abs = 0.0
        self.same: int | None = None

    def update(self, found: Tensor, expected: Tensor, batch: Batch) -> None:
        found, expected = (x.reshape(len(x), -1) if x.ndim == 1 else x for x in (found.float(), expected.float()))
        mask = batch["attention_mask"].unsqueeze(-1) if self.task.takes_text and found.ndim == 3 else None
        if mask is not None:  # padding may be NaN
            found, expected = (x.where(mask.bool(), 0) for x in (found, expected))
        difference = (found - expected).abs()
        if mask is not None:
            found, expected = (x.sum(1) / mask.sum(1) for x in (found, expected))
        elif "top1" not in self.task.unmeasured and found.ndim == 2 and found.shape[1] > 1:
            self.same = (self.same or 0) + int((found.argmax(-1) == expected.argmax(-1)).sum())
        self.max_abs = max(self.max_abs, float(difference.max()))
        cosine = torch.nn.functional.cosine_similarity(found.flatten(1).double(), expected.flatten(1).double())
        self.cosine += float(cosine.clamp(-1, 1).sum())  # rounding leaves that of equal vectors above 1
        self.rows += len(cosine)

    def add(self, other: _VectorMeter) -> None:
        """Count what another meter has seen."""
        self.max_abs = max(self.max_abs, other.max_abs)
        self.cosine += other.cosine
        self.rows += other.rows
        if other.same is not None:
            self.same = (self.same or 0) + other.same

    def result(self, target: str) -> Fidelity:
        return Fidelity(
            target=target,
            status="passed",
            cosine=self.cosine / self.rows,
            max_abs=self.max_abs,
            top1=None if self.same is None else self.same / self.rows,
        )
