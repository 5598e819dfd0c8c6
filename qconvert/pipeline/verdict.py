"""The way from plan, written files and evidence to the report, and from the report to the verdict."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

from qconvert.errors import InputError, ParityError, TargetError
from qconvert.execution.auto_class import auto_class
from qconvert.execution.probes import position_limit
from qconvert.ir.artifact import MANIFEST
from qconvert.ir.batch import row_count
from qconvert.ir.histogram import which_have_one
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.report import (
    CacheLoss,
    CacheReport,
    Evidence,
    Fidelity,
    GateResult,
    Latency,
    Parity,
    Report,
    SampleCounts,
    Size,
)
from qconvert.ir.write_result import WriteResult
from qconvert.job import Job
from qconvert.plan.sizes import CACHE_BYTES
from qconvert.recipe import Recipe
from qconvert.recipe.gates import Gate
from qconvert.report import wording
from qconvert.storage.reader import read_written
from qconvert.targets import TARGETS, graph_files


def make_report(job: Job, folder: Path, evidence: Evidence | None) -> Report:
    """Report everything that is known about the artifact in `folder`; without evidence that is its size, and which gates on it
    are kept, and nothing is claimed to have passed.
    """
    recipe, model, plan, samples = job.recipe, job.model, job.plan, job.samples
    written = read_written(folder)
    size = _size(model, plan, written, folder)
    found = evidence or Evidence()
    gates = tuple(_judge(gate, size, found) for gate in recipe.gates)
    checks: tuple[Parity | Fidelity | Latency, ...] = (*found.parity, *found.fidelity, *found.latency)
    missed = any(part.status == "failed" for part in checks) or not all(gate.passed for gate in gates)
    ran = any(part.status == "passed" for part in found.fidelity)
    return Report(
        passed=False if missed else True if ran else None,
        task=model.task.name,
        quantizer=recipe.quantizer,
        scheme=str(plan.scheme),
        samples=SampleCounts(
            calibration=recipe.calibration.samples if plan.calibrated else 0,
            evaluation=sum(map(row_count, samples.evaluation)),
        ),
        size=size,
        context_length=position_limit(model) if model.task.continues_prompts else None,
        transformers_class=auto_class(model) if recipe.layout == "transformers" and model.config is not None else None,
        processor=found.processor,
        parity=found.parity,
        fidelity=found.fidelity,
        latency=found.latency,
        gates=gates,
        layers=written.layers,
        kept_float=plan.kept_float,
        assignment=written.assignment,
        activations=written.activations,
        kv_cache=_kv_cache(plan, found.cache_loss),
        histograms=_histograms(written),
    )


def _kv_cache(plan: Plan, loss: CacheLoss | None) -> CacheReport | None:
    """What is said of a cache in codes; None for one in float."""
    if plan.kv_cache == "float":
        return None
    assert plan.deployment is not None
    nbytes = plan.deployment.cache_bytes_per_token
    assert nbytes is not None
    in_float = nbytes * CACHE_BYTES["float"] // CACHE_BYTES[plan.kv_cache]
    return CacheReport(kind=plan.kv_cache, bytes_per_token=nbytes, float_bytes_per_token=in_float, loss=loss)


def _histograms(written: WriteResult) -> str | None:
    values = written.activations.values if written.activations else ()
    said = (
        which_have_one([layer.histogram for layer in written.layers], "layers", "relative_error"),
        which_have_one([value.histogram for value in values], "values", "clipped"),
    )
    return "; ".join(filter(None, said)) or None


def _size(model: Model, plan: Plan, written: WriteResult, folder: Path) -> Size:
    weights_bytes = sum(tensor.nbytes for tensor in written.tensors.values())
    quantized = sum(layer.out_features * layer.in_features for layer in plan.layers.values())
    quantized += sum(prod(model.source.tensors[name].shape) for name in plan.cast)
    graphs = [folder / name for target in TARGETS.values() for name in graph_files(model.task, target).values()]
    return Size(
        source_bytes=model.source_bytes,
        weights_bytes=weights_bytes,
        graph_bytes=sum(path.stat().st_size for path in graphs if path.exists()),
        ratio=weights_bytes / model.source_bytes,
        average_bits=8 * sum(layer.bytes for layer in written.layers) / quantized,
    )


def _judge(gate: Gate, size: Size, evidence: Evidence) -> GateResult:
    """A gate holds if every target that was run keeps it; a metric that nobody measured misses it."""
    values = list(_values(gate.metric, size, evidence))
    keeps = [value <= gate.limit if gate.comparison == "<=" else value >= gate.limit for value in values]
    worst = max(values, default=None) if gate.comparison == "<=" else min(values, default=None)
    return GateResult(
        metric=gate.metric,
        comparison=gate.comparison,
        limit=gate.limit,
        value=worst,
        passed=bool(values) and all(keeps),
    )


def _values(metric: str, size: Size, evidence: Evidence) -> Iterable[float]:
    parts: tuple[Size | Fidelity | Latency, ...] = (size, *evidence.fidelity, *evidence.latency)
    for part in parts:
        value = getattr(part, metric, None)
        if value is not None:
            yield value


def is_right(report: Report) -> bool:
    """Return whether every check found that the artifact computes what its weights say."""
    return all(part.status != "failed" for part in report.parity)


def wrong(report: Report) -> ParityError:
    """Return the error QC-PARITY-001 for an artifact that is not right."""
    reasons = "; ".join(f"{part.target}: {part.reason}" for part in report.parity if part.status == "failed")
    where = f" on this processor, {wording.processor(report.processor)}" if report.processor else ""
    return ParityError(
        "QC-PARITY-001",
        f"the artifact is wrong{where}: {reasons}",
        hint="do not use it. This is a bug of qconvert, of a quantizer plugin or of ONNX Runtime on this processor: report it "
        "with the recipe and the processor",
    )


def without_source(folder: Path, reason: InputError) -> InputError:
    """Return the error QC-VERIFY-003 for a folder whose own files are right, but whose float source can't be loaded."""
    return InputError(
        "QC-VERIFY-003",
        f"the files of {folder} are what was written, but the float model to compare them with can't be loaded: "
        f"{reason.message}",
        hint=f"put the source back where the recipe in {MANIFEST} has it, as seen from the folder",
    )


def refuse_unverified(report: Report, recipe: Recipe) -> None:
    """Raise TargetError QC-TARGET-001 if a requested target could not be run here and the user did not allow that."""
    missing = [part for part in report.parity if part.status == "not-run"]
    if missing and not recipe.allow_unverified:
        reasons = "; ".join(f"{part.target}: {part.reason}" for part in missing)
        raise TargetError(
            "QC-TARGET-001",
            f"the files in {recipe.output} are complete and report.json says what was measured, but not everything could be "
            f"run here: {reasons}",
            hint="run qconvert verify on a machine that has it (--target cpu checks only the CPU graph); qconvert run accepts "
            "this with --allow-unverified",
        )
