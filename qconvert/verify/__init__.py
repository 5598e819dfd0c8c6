"""Verify: re-open an artifact from disk, run it, and compare it with its own weights and with the float model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qconvert.errors import InputError
from qconvert.ir import agreement
from qconvert.ir.artifact import graph_files
from qconvert.ir.float_graph import float_graph
from qconvert.ir.layer import Batch
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.progress import Progress
from qconvert.ir.reader import read_index, read_manifest, sha256
from qconvert.ir.report import Evidence, Fidelity, Latency, Parity
from qconvert.ir.runtime import file_session, joined, memory_session, why_unavailable
from qconvert.ir.template import Template
from qconvert.verify.fidelity import measure_fidelity
from qconvert.verify.latency import measure_latency, workload
from qconvert.verify.loaders import transformers_parity
from qconvert.verify.narrow_parity import narrow_parity
from qconvert.verify.parity import TOLERANCE, Artifact, cluster_parity, graph_parity, torch_outputs
from qconvert.verify.placement import Placement, measure_placement

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

    Raises InputError QC-VERIFY-004 where the float model is not the one that the artifact was made from.
    """
    _check_source(folder, model)
    artifact = Artifact(folder, model, plan, read_index(folder))
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    progress.stage("parity", None)
    dequantized = torch_outputs(model, artifact.read)
    parity = []
    if "cpu" in targets and all((folder / file).exists() for file in graph_files(model.task).values()):
        parity.append(_parity("cpu", lambda: max(graph_parity(artifact, dequantized), cluster_parity(artifact))))
    if with_transformers:
        plain = torch_outputs(model, artifact.read_plain) if artifact.has_outliers else dequantized
        parity.append(_parity("transformers", lambda: transformers_parity(artifact, plain)))
    floats = {part: float_graph(graph, model.parameter_shapes) for part, graph in template.graphs.items()}
    baseline = joined({part: memory_session(graph, model.read, threads) for part, graph in floats.items()})
    fidelity, latency = [], []
    for target in targets:
        files = graph_files(model.task, target)
        reason = _why_not_run(folder, target, files.values())
        if reason is not None:
            parity.append(Parity(target=target, status="not-run", reason=reason))
            fidelity.append(Fidelity(target=target, status="not-run", reason=reason))
            latency.append(Latency(target=target, status="not-run", reason=reason))
            continue
        paths = {part: folder / file for part, file in files.items()}
        session = joined({part: file_session(path, target, threads) for part, path in paths.items()})
        if target != "cpu":
            parity.append(narrow_parity(target, model.task, partial(agreement.compared, model, session, dequantized)))
        progress.stage(f"fidelity on {target}", sum(next(iter(batch.values())).shape[0] for batch in evaluation))
        fidelity.append(measure_fidelity(session, baseline, evaluation, model.task, target, progress))
        progress.stage(f"latency on {target}", None)
        # The float graph has no kernels on a device: its attention would run on the CPU, and say nothing about either.
        measured = measure_latency(model, session, baseline if target == "cpu" else None, evaluation, target, threads)
        if target != "cpu":
            measured = _placed(measured, measure_placement(paths, target, workload(model, evaluation)[0]))
        latency.append(measured)
    return Evidence(parity=tuple(parity), fidelity=tuple(fidelity), latency=tuple(latency))


def _placed(measured: Latency, found: Placement) -> Latency:
    """The latency with what ran where; a node that computes with floats has to run on the device."""
    update: dict[str, Any] = {"device_nodes": found.nodes, "cpu_nodes": found.cpu_nodes, "copies": found.copies}
    if found.misplaced:
        update |= {"status": "failed", "reason": f"these nodes ran on the CPU: {', '.join(found.misplaced)}"}
    return measured.model_copy(update=update)


def _why_not_run(folder: Path, target: str, files: Iterable[str]) -> str | None:
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        return f"the folder holds no {missing[0]}: convert with --target {target}"
    return why_unavailable(target)


def check_digests(folder: Path) -> None:
    """Raises InputError QC-VERIFY-001 if a file is missing or differs from its digest in qconvert.json."""
    for name, expected in read_manifest(folder)["outputs"].items():
        path = folder / name
        try:
            found = sha256(path)
        except OSError as error:
            raise InputError("QC-VERIFY-001", f"{path} can't be read: {error}", hint="convert again") from error
        if found != expected:
            raise InputError(
                "QC-VERIFY-001",
                f"{path} is not the file that was written: sha256 {found[:12]}…, expected {expected[:12]}…",
                hint="copy the folder again, or convert again",
            )


def _check_source(folder: Path, model: Model) -> None:
    for name, expected in read_manifest(folder)["inputs"].items():
        path = model.input_files.get(name)
        if path is None or sha256(path) != expected:
            raise InputError(
                "QC-VERIFY-004",
                f"the source {model.name!a} is not what {folder} was made from: {name!a} is {'another' if path else 'missing'}",
                hint="put the original source back: compared with another one, the numbers would mean nothing",
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
