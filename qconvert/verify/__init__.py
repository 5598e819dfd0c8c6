"""Verify: re-open an artifact from disk, run it, and compare it with its own weights and with the float model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from qconvert.errors import InputError
from qconvert.execution import probes
from qconvert.graph.float_graph import float_graph
from qconvert.graph.last_position import keep_last_position, keeps_last_position
from qconvert.ir.artifact import graph_files, is_model_file
from qconvert.ir.batch import Batch, row_count
from qconvert.ir.model import Model
from qconvert.ir.progress import Progress
from qconvert.ir.report import Evidence, Fidelity, Latency, Parity
from qconvert.ir.template import Template
from qconvert.job import Job
from qconvert.ort import compare
from qconvert.ort.processor import processor
from qconvert.ort.session import SessionSettings, file_session, joined, memory_session, why_unavailable
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.storage.digest import sha256
from qconvert.storage.manifest import read_manifest
from qconvert.storage.reader import read_index
from qconvert.verify.attempt import attempt
from qconvert.verify.fidelity import measure_fidelity
from qconvert.verify.finite import require_finite_float
from qconvert.verify.last_position import last_position_pairs, session_at_all_positions
from qconvert.verify.latency import measure_latency, workload
from qconvert.verify.loaders import transformers_parity
from qconvert.verify.narrow_parity import NOT_COMPARABLE, narrow_parity, overflow
from qconvert.verify.parity import TOLERANCE, float_parity, graph_parity, torch_outputs, worst_cluster
from qconvert.verify.placement import Placement, measure_placement

# Of two sessions that alternate, so that neither's idle threads take cores from the other.
SHARING = SessionSettings(spinning=False)
WRONG = "its parity failed: what it computes is wrong"


def verify(folder: Path, job: Job, progress: Progress) -> Evidence:
    """Everything that is said about an artifact, measured on the job's targets and evaluation samples.

    folder: an output folder or a stage with its manifest.

    Raises InputError QC-VERIFY-004 where the float model is not the one that the artifact was made from, QC-FLOAT-001 where it
    gives no finite numbers, and UsageError QC-CUDA-004 where float16 can't hold what the float model can.
    """
    model, template, evaluation, targets = job.model, job.template, job.samples.evaluation, job.recipe.targets
    _check_source(folder, model)
    artifact = ArtifactReader(folder, model, job.plan, read_index(folder))
    progress.stage("parity", None)
    dequantized = torch_outputs(model, artifact.read)
    if not all(bool(torch.isfinite(each).all()) for outputs in dequantized for each in outputs):
        _require_finite_float(model)
    paths = {target: _paths(folder, model, target) for target in targets}
    parity = []
    if "cpu" in targets and all(path.exists() for path in paths["cpu"].values()):
        parity.append(attempt("cpu", lambda: _judged("cpu", *_cpu_error(artifact, paths["cpu"], dequantized))))
    if job.recipe.layout == "transformers" and model.config is not None:  # the folder promises to load there
        parity.append(_parity("transformers", partial(transformers_parity, artifact, dequantized)))
    reasons = {target: _why_not_run(files.values(), target) for target, files in paths.items()}
    parity += [Parity(target=target, status="not-run", reason=reason) for target, reason in reasons.items() if reason]
    fidelity = {target: Fidelity(target=target, status="not-run", reason=reason) for target, reason in reasons.items()}
    latency = {target: Latency(target=target, status="not-run", reason=reason) for target, reason in reasons.items()}
    in_float16 = job.recipe.cuda_dtype == "float16"
    runnable = [target for target in targets if reasons[target] is None]
    baseline = _open_float(template, model, SHARING)
    parity.append(_parity("float", lambda: float_parity(model, baseline, evaluation[0])))
    for target in list(runnable):
        if target != "cpu":
            pairs = partial(_device_pairs, model, paths[target], target, dequantized)
            parity.append(narrow_parity(target, model.task, pairs, in_float16=in_float16))
        if any(part.target == target and part.status == "failed" for part in parity):
            runnable.remove(target)
            fidelity[target] = Fidelity(target=target, status="not-run", reason=WRONG)
            latency[target] = Latency(target=target, status="not-run", reason=WRONG)
            continue
        session = joined({part: session_at_all_positions(path, target, SHARING) for part, path in paths[target].items()})
        progress.stage(f"fidelity on {target}", sum(map(row_count, evaluation)))
        fidelity[target] = measure_fidelity(session, baseline, evaluation, model.task, target, progress)
        if fidelity[target].status == "failed" and target != "cpu" and in_float16:
            raise overflow(target, "the evaluation data")
    baseline = None  # before others are opened: float weights are large
    for target in runnable:
        progress.stage(f"latency on {target}", None)
        latency[target] = _measured(paths[target], template, model, evaluation, target)
    return Evidence(
        processor=processor(), parity=tuple(parity), fidelity=tuple(fidelity.values()), latency=tuple(latency.values())
    )


def _require_finite_float(model: Model) -> None:
    for probe, outputs in zip(probes.probes(model), torch_outputs(model, model.read), strict=True):
        for output in outputs:
            require_finite_float(output, probe, "built-in")


def _cpu_error(
    artifact: ArtifactReader, paths: Mapping[str, Path], dequantized: Sequence[tuple[Tensor, ...]]
) -> tuple[float, str]:
    """(largest relative difference, what differs by that)."""
    pairs = [pair for path in paths.values() for pair in last_position_pairs(artifact.model, path, "cpu")]
    errors = [(compare.largest_difference(found, reference), "logits of the last position") for found, reference in pairs]
    whole = graph_parity(artifact, dequantized), "outputs, with float activations,"
    return max(whole, worst_cluster(artifact), *errors)


def _device_pairs(
    model: Model, paths: Mapping[str, Path], target: str, dequantized: Sequence[tuple[Tensor, ...]]
) -> list[tuple[np.ndarray[Any, Any], ...]]:
    """(what the graphs give on a target, what they should): torch's outputs, and their own at the last positions."""
    session = joined({part: session_at_all_positions(path, target) for part, path in paths.items()})
    own = [pair for path in paths.values() for pair in last_position_pairs(model, path, target)]
    return compare.compared(model, session, dequantized) + own


def _open_float(template: Template, model: Model, settings: SessionSettings, *, last_position: bool = False) -> Any:
    """last_position: whether the head is spared the rest of a prompt, as it is in the artifact."""
    graphs = {part: graph.clone() for part, graph in template.graphs.items()}
    if last_position and model.output_head is not None:
        keep_last_position(graphs["model"].graph, model.output_head)
    floats = {part: float_graph(graph, model.parameter_shapes) for part, graph in graphs.items()}
    return joined({part: memory_session(graph, model.read, settings) for part, graph in floats.items()})


def _measured(paths: Mapping[str, Path], template: Template, model: Model, evaluation: Sequence[Batch], target: str) -> Latency:
    """Latency of the graphs in `paths`, and what they ran it with."""

    def open_artifact(settings: SessionSettings) -> Any:
        return joined({part: file_session(path, target, settings) for part, path in paths.items()})

    graphs = [onnx_ir.load(path).graph for path in paths.values()]
    open_float = partial(_open_float, template, model, last_position=any(map(keeps_last_position, graphs)))
    # The float graph has no kernels on a device: its attention would run on the CPU, and say nothing about either.
    measured = measure_latency(model, open_artifact, open_float if target == "cpu" else None, evaluation, target)
    if target != "cpu":
        return _placed(measured, measure_placement(paths, target, workload(model, evaluation)[0]))
    levels = [each.attributes["accuracy_level"].as_int() for graph in graphs for each in graph if each.op_type == "MatMulNBits"]
    return measured.model_copy(update={"accuracy_level": max(levels, default=None)})


def _paths(folder: Path, model: Model, target: str) -> dict[str, Path]:
    return {part: folder / file for part, file in graph_files(model.task, target).items()}


def _placed(measured: Latency, found: Placement) -> Latency:
    """The latency with what ran where; a node that computes with floats has to run on the device."""
    update: dict[str, Any] = {"device_nodes": found.nodes, "cpu_nodes": found.cpu_nodes, "copies": found.copies}
    if found.misplaced:
        update |= {"status": "failed", "reason": f"these nodes ran on the CPU: {', '.join(found.misplaced)}"}
    return measured.model_copy(update=update)


def _why_not_run(paths: Iterable[Path], target: str) -> str | None:
    missing = [path for path in paths if not path.exists()]
    if missing:
        return f"the folder holds no {missing[0].name}: convert with --target {target}"
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
    inputs = read_manifest(folder)["inputs"]
    for name, expected in ((name, expected) for name, expected in inputs.items() if is_model_file(name)):
        path = model.input_files.get(name)
        if path is None or sha256(path) != expected:
            raise InputError(
                "QC-VERIFY-004",
                f"the source {model.name!a} is not what {folder} was made from: {name!a} is {'another' if path else 'missing'}",
                hint="put the original source back: compared with another one, the numbers would mean nothing",
            )


def _parity(target: str, measure: Callable[[], float]) -> Parity:
    """A measured difference, or what went wrong: an artifact that can't be run has failed."""
    return attempt(target, lambda: _judged(target, measure()))


def _judged(target: str, error: float, what: str = "outputs") -> Parity:
    if error <= TOLERANCE:
        return Parity(target=target, status="passed", max_relative_error=error)
    if error == float("inf"):
        return Parity(target=target, status="failed", reason=NOT_COMPARABLE)
    reason = f"{what} differ by {error:.1e} of the largest, the limit is {TOLERANCE:.0e}"
    return Parity(target=target, status="failed", max_relative_error=error, reason=reason)
