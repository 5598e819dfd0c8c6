"""The things that lowering a graph takes, whatever the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from qconvert.ir.activation_codes import ActivationCodes
from qconvert.ir.artifact import StoredTensor
from qconvert.ir.write_result import WriteResult
from qconvert.job import Job
from qconvert.storage.reader import read_tensor
from qconvert.storage.stage import Stage


@dataclass(frozen=True, eq=False)
class ExportContext:
    """A job whose weights are written.

    stored: tensor -> its place in the artifact's files; grows with what graphs add to the sidecar.
    outlier_columns: layer -> its outlier columns, of the layers that have some.
    group_of: layer -> the number of the InputGroup that it was quantized in.
    codes: of the graph at hand, value that is quantized in a static range -> its codes.
    cache_scales: input that is a cache in codes -> its scales.
    """

    job: Job
    stage: Stage
    stored: dict[str, StoredTensor]
    outlier_columns: Mapping[str, tuple[int, ...]]
    group_of: Mapping[str, int]
    codes: Mapping[str, ActivationCodes] = field(default_factory=dict)
    cache_scales: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(job: Job, written: WriteResult, stage: Stage) -> ExportContext:
        """Return the context of a job whose weights are `written`. Raises InputError where a written tensor can't be read."""
        stored = dict(written.tensors)
        outlier_columns = {
            name: tuple(read_tensor(stage.folder, stored[key]).tolist())
            for name in job.plan.layers
            if (key := f"{name}.outlier_columns") in stored
        }
        group_of = {name: number for number, group in enumerate(job.template.groups) for name in group.layers}
        return ExportContext(job, stage, stored, outlier_columns, group_of)
