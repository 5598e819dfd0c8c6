"""Graphs of a job run with any of its static layers in float, and what their outputs lose."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from qconvert.allocate.output_loss import OutputLoss, Outputs, sample_losses
from qconvert.execution.trial_weights import TrialWeights
from qconvert.ir.activation_codes import NO_CODES, GraphCodes
from qconvert.ir.finite import all_finite, not_finite
from qconvert.job import Job
from qconvert.ort.compare import feed
from qconvert.ort.pieces import run_each
from qconvert.ort.session import Values
from qconvert.ort.static_values import rounded_session

# Numbers of the float model's outputs that are held to compare with: more samples than have room are not looked at.
MOST_NUMBERS = 2**27


class Trials:
    """Weights and activations of a job, rounded as they will be, but for layers that stay in float.

    weights, codes: of the job's plan, in which they are static.
    """

    def __init__(self, job: Job, weights: TrialWeights, codes: GraphCodes) -> None:
        self.job, self.weights, self.codes = job, weights, codes

    def loss(self, in_float: Collection[str], count: int | None = None) -> OutputLoss:
        """Measure what is lost with some layers in float. count: on how many of the samples; unset, on all.

        Raises InputError QC-FLOAT-001 for a float model whose outputs are not finite.
        """
        job = self.job
        session = rounded_session(
            job.model,
            job.template,
            lambda name: job.plan.is_static_layer(name) and name not in in_float,
            self.codes,
            self.weights.reader(lambda name: name in in_float),
        )
        feeds, expected = self._float
        found = self._run(session, feeds[:count])
        return OutputLoss.of(
            torch.stack([sample_losses(*pair, job.model.task) for pair in zip(found, expected[:count], strict=True)])
        )

    @cached_property
    def _float(self) -> tuple[list[Values], list[Outputs]]:
        """What goes into the float model and comes out of it, sample by sample."""
        model = self.job.model
        session = rounded_session(model, self.job.template, lambda name: False, NO_CODES, model.read)
        feeds = [feed(session, row) for row in model.single_rows(self.job.samples.calibration)]
        expected: list[Outputs] = []
        for number, outputs in enumerate(self._run(session, feeds)):
            if not all(all_finite(torch.from_numpy(output)) for output in outputs):
                raise not_finite(f"comes out of the float model for calibration sample {number + 1}")
            expected.append(outputs)
            if sum(output.size for output in outputs) * len(expected) >= MOST_NUMBERS:
                break
        return feeds[: len(expected)], expected

    def _run(self, session: Any, feeds: Sequence[Values]) -> Iterator[Outputs]:
        """What a graph gives for each sample: of models that write text the logits, which caches follow."""
        return run_each(session, feeds, first=1 if self.job.model.task.generates else None)
