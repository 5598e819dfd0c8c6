"""Verify: re-open an artifact from disk, run it, and compare it with its own weights and with the float model."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from qconvert.execution import probes
from qconvert.ir.model import Model
from qconvert.ir.progress import Progress
from qconvert.ir.report import Evidence, Fidelity, Latency, Parity
from qconvert.job import Job
from qconvert.ort.pieces import piece_count
from qconvert.ort.processor import processor
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.storage.reader import read_index
from qconvert.targets import TARGETS
from qconvert.verify.attempt import measured_parity
from qconvert.verify.finite import require_finite_float
from qconvert.verify.loaders import needs_bitsandbytes, transformers_parity
from qconvert.verify.parity import float_parity, torch_outputs
from qconvert.verify.source import check_digests, check_source
from qconvert.verify.target_check import WRONG, Outputs, TargetCheck, float_session, sharing

__all__ = ["check_digests", "verify"]

NO_BITSANDBYTES = "transformers needs bitsandbytes for codebooks, and it is not installed (pip install bitsandbytes)"


def verify(folder: Path, job: Job, progress: Progress) -> Evidence:
    """Measure everything that is said about an artifact, on the job's targets and evaluation samples.

    folder: an output folder or a stage with its manifest.

    Raises InputError QC-VERIFY-004 where the float model is not the one that the artifact was made from, QC-FLOAT-001 where it
    gives no finite numbers, and UsageError QC-CUDA-004 where float16 can't hold what the float model can.
    """
    check_source(folder, job.model)
    artifact = ArtifactReader(folder, job.model, job.plan, read_index(folder))
    progress.stage("parity", None)
    dequantized = _dequantized_outputs(artifact)
    checks = [TargetCheck(TARGETS[name], job, artifact) for name in job.recipe.targets]
    found = [check.parity(dequantized) for check in checks if not check.target.half_precision and check.is_there]
    if job.recipe.layout == "transformers" and job.model.config is not None:  # the folder promises to load there
        found.append(_transformers_parity(artifact, dequantized))
    not_run = {check.target.name: check.not_run for check in checks if check.not_run}
    found += [Parity(target=name, status="not-run", reason=reason) for name, reason in not_run.items()]
    baseline = float_session(job, sharing(job))
    sample = job.samples.evaluation[0]
    found.append(measured_parity("float", lambda: float_parity(job.model, baseline, sample), pieces=piece_count(baseline)))
    fidelity: dict[str, Fidelity] = {}
    for check in checks:
        name = check.target.name
        if name not in not_run and check.target.half_precision:
            found.append(check.parity(dequantized))
        if any(part.target == name and part.status == "failed" for part in found):
            not_run.setdefault(name, WRONG)
        if name in not_run:
            fidelity[name] = Fidelity(target=name, status="not-run", reason=not_run[name])
        else:
            fidelity[name] = check.fidelity(baseline, progress)
    baseline = None  # before others are opened: float weights are large
    losses = [check.cache_loss(progress) for check in checks if check.target.name not in not_run]
    latency = [
        Latency(target=name, status="not-run", reason=not_run[name]) if name in not_run else check.latency(progress)
        for check in checks
        for name in [check.target.name]
    ]
    return Evidence(
        processor=processor(),
        parity=tuple(found),
        fidelity=tuple(fidelity.values()),
        latency=tuple(latency),
        cache_loss=next(filter(None, losses), None),
    )


def _transformers_parity(artifact: ArtifactReader, dequantized: Outputs) -> Parity:
    if needs_bitsandbytes(artifact) and find_spec("bitsandbytes") is None:
        return Parity(target="transformers", status="not-run", reason=NO_BITSANDBYTES)
    return measured_parity("transformers", partial(transformers_parity, artifact, dequantized))


def _dequantized_outputs(artifact: ArtifactReader) -> Outputs:
    """Torch's outputs on the artifact's weights. Raises InputError QC-FLOAT-001 where even the float model's are not finite."""
    outputs = torch_outputs(artifact.model, artifact.open)
    if not all(bool(torch.isfinite(each).all()) for row in outputs for each in row):
        _require_finite_float(artifact.model)
    return outputs


def _require_finite_float(model: Model) -> None:
    for probe, outputs in zip(probes.probes(model), torch_outputs(model, model.read), strict=True):
        for output in outputs:
            require_finite_float(output, probe, "built-in")
