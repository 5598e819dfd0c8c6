"""Verify: re-open an artifact from disk, run it, and compare it with its own weights and with the float model."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from qconvert.errors import InputError
from qconvert.ir.artifact import GRAPHS
from qconvert.ir.float_graph import float_graph
from qconvert.ir.layer import Batch
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.progress import Progress
from qconvert.ir.reader import read_index, read_manifest
from qconvert.ir.report import Evidence, Fidelity, Latency, Parity
from qconvert.ir.runtime import available, file_session, memory_session
from qconvert.ir.template import Template
from qconvert.verify.fidelity import measure_fidelity
from qconvert.verify.latency import measure_latency
from qconvert.verify.loaders import transformers_parity
from qconvert.verify.parity import TOLERANCE, Artifact, cluster_parity, graph_parity, torch_outputs

logger = logging.getLogger("qconvert")


def verify(
    folder: Path,
    model: Model,
    template: Template,
    plan: Plan,
    evaluation: Sequence[Batch],
    targets: Sequence[str],
    progress: Progress,
    *,
    with_transformers: bool,
) -> Evidence:
    """Everything that is said about an artifact, measured.

    folder: an output folder or a stage with its manifest. evaluation: held-out samples.
    with_transformers: whether the folder promises to load in transformers.

    Raises InputError QC-VERIFY-001 where a file is not what the manifest says.
    """
    progress.stage("check files", None)
    check_digests(folder)
    artifact = Artifact(folder, model, plan, read_index(folder))
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    progress.stage("parity", None)
    dequantized = torch_outputs(model, artifact.read)
    parity = []
    if "cpu" in targets:
        parity.append(_parity("cpu", lambda: max(graph_parity(artifact, dequantized), cluster_parity(artifact))))
    if with_transformers:
        plain = torch_outputs(model, artifact.read_plain) if artifact.has_outliers else dequantized
        parity.append(_parity("transformers", lambda: transformers_parity(artifact, plain)))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.module.named_parameters(remove_duplicate=False)}

    def read(name: str) -> Tensor:
        return template.constants[name] if name in template.constants else model.read(name)

    baseline = memory_session(float_graph(template.graph, shapes), read, threads)
    fidelity, latency = [], []
    for target in targets:
        if not available(target):
            reason = f"this machine's ONNX Runtime has no provider for {target}"
            parity.append(Parity(target=target, status="not-run", reason=reason))
            fidelity.append(Fidelity(target=target, status="not-run", reason=reason))
            latency.append(Latency(target=target, status="not-run", reason=reason))
            continue
        session = file_session(folder / GRAPHS[target], target, threads)
        progress.stage(f"fidelity on {target}", sum(next(iter(batch.values())).shape[0] for batch in evaluation))
        fidelity.append(measure_fidelity(session, baseline, evaluation, model.task, target, progress))
        progress.stage(f"latency on {target}", None)
        latency.append(measure_latency(model, session, baseline, evaluation, target, threads))
    return Evidence(parity=tuple(parity), fidelity=tuple(fidelity), latency=tuple(latency))


def check_digests(folder: Path) -> None:
    """Raises InputError QC-VERIFY-001 if a file is missing or differs from its digest in qconvert.json."""
    outputs = read_manifest(folder)["outputs"]
    for name, expected in outputs.items():
        path = folder / name
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError("QC-VERIFY-001", f"{path} can't be read: {error}", hint="convert again") from error
        if found != expected:
            raise InputError(
                "QC-VERIFY-001",
                f"{path} is not the file that was written: sha256 {found[:12]}…, expected {expected[:12]}…",
                hint="copy the folder again, or convert again",
            )


def _parity(target: str, measure: Callable[[], float]) -> Parity:
    """A measured difference, or what went wrong: an artifact that can't be run has failed, whatever the reason."""
    try:
        error = measure()
    except Exception as failure:
        logger.debug("parity on %s could not be measured", target, exc_info=True)
        return Parity(target=target, status="failed", reason=f"it can't be run: {type(failure).__name__}: {failure}")
    if error <= TOLERANCE:
        return Parity(target=target, status="passed", max_relative_error=error)
    reason = f"outputs differ by {error:.1e} of the largest, the limit is {TOLERANCE:.0e}"
    return Parity(target=target, status="failed", max_relative_error=error if error != float("inf") else None, reason=reason)
