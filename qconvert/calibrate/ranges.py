"""The ranges of static activations: what flows through the graph of the quantized weights, and what is chosen from that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from qconvert.calibrate.trained_ranges import trained_ranges
from qconvert.ir.activation_codes import ActivationCodes, GraphCodes
from qconvert.ir.activation_ranges import ActivationRange, ActivationRanges
from qconvert.ir.batch import row_count
from qconvert.ir.distribution import Distribution, ValueRange
from qconvert.ir.finite import all_finite, not_finite
from qconvert.ir.progress import Progress
from qconvert.job import Job
from qconvert.ort import compare
from qconvert.ort.static_values import StaticValues, coded_roots, coded_values
from qconvert.plugin.host import contract
from qconvert.storage.artifact_reader import ArtifactReader


def static_ranges(job: Job, artifact: ArtifactReader, progress: Progress) -> ActivationRanges | None:
    """Return the range of every value that static activations quantize, with its codes; None where there are none.

    The calibration samples are run on the weights as they were written, so that scales which were folded into them count, and
    without padding. Each value's range is chosen by the job's range estimator, unless training has settled on it.

    Raises InputError QC-FLOAT-001 for a value that is not finite, PluginError for an estimator that breaks its contract.
    """
    if not job.plan.is_static:
        return None
    if job.model.trained is not None:
        return trained_ranges(job, job.model.trained)
    assert job.range_estimator is not None
    readers = coded_roots(job.template, job.plan.is_static_layer)
    values = StaticValues(job.model, job.template, readers, artifact.read)
    found = []
    for (part, name), seen in _distributions(job, values, progress).items():
        chosen, codes = _chosen(job, seen, name)
        found.append(
            ActivationRange(
                part=part,
                name=name,
                layers=readers[part][name],
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
    return ActivationRanges(job.range_estimator.name, tuple(found)).bounded


def value_codes(job: Job, read: Callable[[str], Tensor], progress: Progress) -> GraphCodes:
    """Return codes for every value that is one in any graph in which some of the planned static layers stay in float.

    Where a convolution stays in float, the pool behind it may be the first value in codes, which has a range of its own then.
    read: gives a parameter. Raises what `static_ranges` raises.
    """
    values = StaticValues(job.model, job.template, coded_values(job.template, job.plan.is_static_layer), read)
    found: dict[str, dict[str, ActivationCodes]] = defaultdict(dict)
    for (part, name), seen in _distributions(job, values, progress).items():
        _, found[part][name] = _chosen(job, seen, name)
    return found


def _chosen(job: Job, seen: Distribution, name: str) -> tuple[ValueRange, ActivationCodes]:
    """The range of a value that the job's estimator chooses, and the codes that spread over it."""
    how, estimator = job.plan.activations, job.range_estimator
    assert how is not None
    assert estimator is not None
    symmetric = how.symmetric and seen.minimum < 0  # codes of numbers that do not occur would be for nothing
    chosen = contract.choose_range(estimator, seen, how.codes, symmetric, name)
    return chosen, ActivationCodes.of(chosen.low, chosen.high, how)


def _distributions(job: Job, values: StaticValues, progress: Progress) -> dict[tuple[str, str], Distribution]:
    """What was seen of each value by (part, name), a sample at a time: values between layers are large."""
    samples = job.samples.calibration
    progress.stage("ranges", sum(map(row_count, samples)))
    seen: dict[tuple[str, str], Distribution] = {}
    for row in job.model.single_rows(samples):
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
