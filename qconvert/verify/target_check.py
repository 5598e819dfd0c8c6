"""One target of an artifact: run there, and compared with torch and with the float graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from torch import Tensor

from qconvert.execution.probes import vocabulary_size
from qconvert.graph.float_graph import float_graph
from qconvert.graph.last_position import keep_last_position, keeps_last_position
from qconvert.ir.batch import row_count, windows_at_once
from qconvert.ir.model import Model
from qconvert.ir.progress import Progress
from qconvert.ir.report import CacheLoss, Fidelity, Latency, Parity
from qconvert.job import Job
from qconvert.ort import compare
from qconvert.ort.footprint import footprint
from qconvert.ort.large_pieces import fed_if_large, in_tiles
from qconvert.ort.pieces import piece_count, sized_session
from qconvert.ort.session import SessionSettings, file_session, joined, memory_session, why_unavailable
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.targets import graph_files
from qconvert.targets.cpu import CPU
from qconvert.targets.target import Target
from qconvert.verify.attempt import attempt, judged
from qconvert.verify.cache_loss import measure_cache_loss
from qconvert.verify.cache_parity import worst_cache
from qconvert.verify.cores import core_count
from qconvert.verify.fidelity import measure_fidelity
from qconvert.verify.last_position import last_position_pairs, session_at_all_positions
from qconvert.verify.latency import measure_latency, workload
from qconvert.verify.narrow_parity import narrow_parity, overflow
from qconvert.verify.parity import float_activations_session, target_phases, worst_cluster
from qconvert.verify.phases import choice_pairs
from qconvert.verify.placement import Placement, measure_placement
from qconvert.verify.static_parity import worst_codes

WRONG = "its parity failed: what it computes is wrong"
# Torch's outputs on the dequantized weights, for each of the probes.
Outputs = Sequence[tuple[Tensor, ...]]


class TargetCheck:
    """The measurements of an artifact on one target, from its files.

    paths: part -> the file of its graph.
    not_run: why it can't be run, None where it can.
    """

    def __init__(self, target: Target, job: Job, artifact: ArtifactReader) -> None:
        self.target, self.job, self.artifact = target, job, artifact
        self.paths = {part: artifact.folder / file for part, file in graph_files(job.model.task, target).items()}
        self.not_run = _why_not_run(self.paths, target)

    @property
    def is_there(self) -> bool:
        """Whether the folder holds the target's graphs."""
        return all(path.exists() for path in self.paths.values())

    def parity(self, dequantized: Outputs) -> Parity:
        """Compare the graphs with torch on the artifact's own weights."""
        name = self.target.name
        if not self.target.half_precision:
            return attempt(name, lambda: self._compared(dequantized))
        return narrow_parity(name, self.job.model.task, partial(self._pairs, dequantized), in_float16=self._in_float16)

    def fidelity(self, baseline: Any, progress: Progress) -> Fidelity:
        """Compare the graphs with the float model, on the evaluation samples. Raises UsageError QC-CUDA-004."""
        name, model, samples = self.target.name, self.job.model, self.job.samples.evaluation
        settings = sharing(self.job)
        session = joined({part: session_at_all_positions(path, name, settings) for part, path in self.paths.items()})
        progress.stage(f"fidelity on {name}", sum(map(row_count, samples)))
        at_once = windows_of(self.job) if self.target is CPU else 1
        # Windows are prompts: the body for decoding is not run on any by the graph itself.
        decoding = self._decoding_session(settings) if "decode" in target_phases(self.artifact, self.target) else None
        found = measure_fidelity(session, baseline, samples, model.task, name, progress, decoding=decoding, at_once=at_once)
        if found.status == "failed" and self.target.half_precision and self._in_float16:
            raise overflow(name, "the evaluation data")
        return found

    def _decoding_session(self, settings: SessionSettings) -> Any:
        """A session over the body for decoding, which gives for a whole window what it gives token by token."""
        name = self.target.name
        return joined({part: session_at_all_positions(path, name, settings, "decode") for part, path in self.paths.items()})

    def cache_loss(self, progress: Progress) -> CacheLoss | None:
        """Measure what a cache in codes loses; None for one in float."""
        if self.job.plan.kv_cache == "float":
            return None
        progress.stage(f"cache on {self.target.name}", None)
        return measure_cache_loss(self.artifact, self.paths["model"], self.job.samples.evaluation, sharing(self.job))

    def latency(self, progress: Progress) -> Latency:
        """Measure how fast the graphs are, and with which settings and kernels they ran."""
        name, model, samples = self.target.name, self.job.model, self.job.samples.evaluation
        progress.stage(f"latency on {name}", None)

        def open_artifact(settings: SessionSettings) -> Any:
            return joined({part: file_session(path, name, settings) for part, path in self.paths.items()})

        graphs = [onnx_ir.load(path).graph for path in self.paths.values()]
        open_float = partial(float_session, self.job, last_position=any(map(keeps_last_position, graphs)), timed=True)
        measure = partial(
            measure_latency,
            model=model,
            artifact=open_artifact,
            batches=samples,
            target=name,
            seconds=self.job.recipe.timing_seconds,
        )
        if self.target.half_precision:
            # The float graph has no kernels on a device: its attention would run on the CPU, and say nothing about either.
            measured = measure(baseline=None)
            return _placed(measured, measure_placement(self.paths, name, workload(model, samples)[0]))
        measured = measure(baseline=open_float)
        products = (node for graph in graphs for node in graph.all_nodes() if node.op_type == "MatMulNBits")
        level = max((node.attributes["accuracy_level"].as_int() for node in products), default=None)
        loaded, loading = footprint(self.paths.values()) or (None, None)
        return measured.model_copy(update={"accuracy_level": level, "loaded_bytes": loaded, "loading_bytes": loading})

    @property
    def _in_float16(self) -> bool:
        return self.job.recipe.cuda_dtype == "float16"

    def _compared(self, dequantized: Outputs) -> Parity:
        """The largest relative difference, judged."""
        name, model = self.target.name, self.job.model
        errors = [
            (compare.largest_difference(found, reference), "what is chosen for a prompt or a step")
            for path in self.paths.values()
            for found, reference in choice_pairs(model, path, name)
        ]
        for phase in target_phases(self.artifact, self.target):
            of_phase = "" if phase is None else f" of the body for {'prompts' if phase == 'prompt' else 'decoding'}"
            pairs = [pair for path in self.paths.values() for pair in last_position_pairs(model, path, name, phase)]
            errors += [(compare.largest_difference(*pair), f"logits of the last position{of_phase}") for pair in pairs]
            session = float_activations_session(self.artifact, self.target, phase)
            errors.append((compare.relative_error(model, session, dequantized), f"outputs{of_phase}, with float activations,"))
            pieces = piece_count(session)
            del session  # before another is opened
            errors += [check(self.artifact, self.target, phase) for check in (worst_cluster, worst_codes)]
        errors.append(worst_cache(self.artifact, self.target, self.job.samples.evaluation[0]))
        return judged(name, *max(errors), pieces=pieces)

    def _pairs(self, dequantized: Outputs) -> list[tuple[np.ndarray[Any, Any], ...]]:
        """(what the graphs give, what they should): torch's outputs, and their own at the last positions."""
        session = joined({part: session_at_all_positions(path, self.target.name) for part, path in self.paths.items()})
        own = [pair for path in self.paths.values() for pair in last_position_pairs(self.job.model, path, self.target.name)]
        return compare.compared(self.job.model, session, dequantized) + own


def windows_of(job: Job) -> int:
    """Return how many evaluation windows of a model that writes text are run at once; 1 of any other."""
    if not job.model.task.generates:
        return 1
    batches = job.samples.evaluation
    tokens = max(batch["input_ids"].shape[1] for batch in batches)
    return min(windows_at_once(tokens, vocabulary_size(job.model)), sum(map(row_count, batches)))


def sharing(job: Job) -> SessionSettings:
    """Return the settings of sessions that run as many windows at once: with so few threads each that they have the cores."""
    at_once = windows_of(job)
    return SessionSettings() if at_once == 1 else SessionSettings(max(1, core_count() // at_once))


def float_session(job: Job, settings: SessionSettings, *, last_position: bool = False, timed: bool = False) -> Any:
    """Open a session over the float graphs of a model, fed from its source; over large ones, in pieces.

    last_position: whether the head is spared the rest of a prompt, as it is in the artifact.
    timed: whether it should be as fast as it can be; otherwise a large head is held a tile at a time.
    """
    model: Model = job.model
    graphs = {part: graph.clone() for part, graph in job.template.graphs.items()}
    if last_position and model.output_head is not None:
        keep_last_position(graphs["model"].graph, model.output_head)
    floats = {part: float_graph(graph, model.parameter_shapes) for part, graph in graphs.items()}
    open_piece = fed_if_large(model.read, settings, partial(memory_session, read=model.read, settings=settings))
    if not timed:
        open_piece = in_tiles(model.read, open_piece)
    return joined({part: sized_session(graph, open_piece) for part, graph in floats.items()})


def _placed(measured: Latency, found: Placement) -> Latency:
    """The latency with what ran where; a node that computes with floats has to run on the device."""
    update: dict[str, Any] = {"device_nodes": found.nodes, "cpu_nodes": found.cpu_nodes, "copies": found.copies}
    if found.misplaced:
        update |= {"status": "failed", "reason": f"these nodes ran on the CPU: {', '.join(found.misplaced)}"}
    return measured.model_copy(update=update)


def _why_not_run(paths: Mapping[str, Path], target: Target) -> str | None:
    missing = [path for path in paths.values() if not path.exists()]
    if missing:
        return f"the folder holds no {missing[0].name}: convert with --target {target.name}"
    return why_unavailable(target.name)
