"""The ranges of static activations: what flows through the graph of the quantized weights, and what is chosen from that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from qconvert.calibrate.trained_ranges import trained_ranges
from qconvert.ir.activation_codes import ActivationCodes
from qconvert.ir.activation_ranges import ActivationRange, ActivationRanges
from qconvert.ir.batch import Batch, row_count, unpadded
from qconvert.ir.distribution import Distribution
from qconvert.ir.finite import all_finite, not_finite
from qconvert.ir.model import Model
from qconvert.ir.progress import Progress
from qconvert.job import Job
from qconvert.ort import compare
from qconvert.ort.static_values import StaticValues
from qconvert.plugin.host import contract
from qconvert.storage.artifact_reader import ArtifactReader


def static_ranges(job: Job, artifact: ArtifactReader, progress: Progress) -> ActivationRanges | None:
    """Return the range of every value that static activations quantize, with its codes; None where there are none.

    The calibration samples are run on the weights as they were written, so that scales which were folded into them count, and
    without padding. Each value's range is chosen by the job's range estimator, unless training has settled on it.

    Raises InputError QC-FLOAT-001 for a value that is not finite, PluginError for an estimator that breaks its contract.
    """
    plan, estimator, trained = job.plan, job.range_estimator, job.model.trained
    if not plan.is_static:
        return None
    if trained is not None:
        return trained_ranges(job, trained)
    assert estimator is not None
    how = plan.activations
    assert how is not None
    values = StaticValues(job.model, job.template, plan.is_static_layer, artifact.read)
    found = []
    for (part, name), seen in _distributions(job, values, progress).items():
        symmetric = how.symmetric and seen.minimum < 0  # codes of numbers that do not occur would be for nothing
        chosen = contract.choose_range(estimator, seen, how.codes, symmetric, name)
        codes = ActivationCodes.of(chosen.low, chosen.high, how)
        found.append(
            ActivationRange(
                part=part,
                name=name,
                layers=values.readers[part][name],
                count=seen.count,
                minimum=seen.minimum,
                maximum=seen.maximum,
                low=chosen.low,
                high=chosen.high,
                clipped=seen.share_beyond(chosen.low, chosen.high),
                scale=codes.scale,
                zero_point=codes.zero_point,
                bits=codes.bits,
                histogram=seen.histogram,
            )
        )
    return ActivationRanges(estimator.name, tuple(found)).bounded


def _distributions(job: Job, values: StaticValues, progress: Progress) -> dict[tuple[str, str], Distribution]:
    """What was seen of each value by (part, name), a sample at a time: values between layers are large."""
    samples = job.samples.calibration
    progress.stage("ranges", sum(map(row_count, samples)))
    seen: dict[tuple[str, str], Distribution] = {}
    for row in rows_of_samples(job.model, samples):
        for part, found in values.run(compare.feed(values.session, row)).items():
            for name, value in found.items():
                tensor = torch.from_numpy(value)
                if not all_finite(tensor):
                    raise not_finite(f"is what {name!r} becomes during calibration")
                distribution = Distribution.of(tensor)
                known = seen.get((part, name))
                seen[part, name] = distribution if known is None else known.merged(distribution)
        progress.advance()
    return seen


def rows_of_samples(model: Model, samples: Sequence[Batch]) -> Iterator[Batch]:
    """Yield the samples, each by itself and without padding."""
    for batch in samples:
        for number in range(row_count(batch)):
            yield unpadded(model.take_rows(batch, slice(number, number + 1)))
