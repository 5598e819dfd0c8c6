"""Several recipes on one model: loaded, traced and calibrated once, then each an artifact of its own."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from qconvert.calibrate import read_samples
from qconvert.errors import QConvertError, told
from qconvert.execution.block_runner import checked_device
from qconvert.ir.comparison import FILE, PLOT, Comparison, Entry
from qconvert.ir.layer import Block
from qconvert.ir.model import Model
from qconvert.ir.progress import Progress, silent
from qconvert.ir.report import Report
from qconvert.ir.samples import Samples
from qconvert.job import Job
from qconvert.pipeline import preflight, verdict
from qconvert.pipeline.conversion import Conversion, convert, opened_stage, quantize_blocks
from qconvert.pipeline.preparation import load_model, open_model, outline
from qconvert.pipeline.room import require_room
from qconvert.pipeline.staged import staged
from qconvert.plan import calibrates, is_static
from qconvert.plan.peaks import trace_peak
from qconvert.plugin.host.manager import PluginManager
from qconvert.plugin.quantizer import Quantizer
from qconvert.recipe import Recipe
from qconvert.report.plot import plot
from qconvert.storage.disk import disk_errors, replace_file
from qconvert.storage.stage import Stage
from qconvert.vocabulary import AUTO
from qconvert.write.origin import Origin, origin_of

logger = logging.getLogger("qconvert")


def compare(recipes: Mapping[str, Recipe], progress: Progress = silent, plugins: PluginManager | None = None) -> Comparison:
    """Convert one model by every recipe, and say in the folder around their outputs what became of each.

    recipes: name -> recipe, as `named_recipes` gives them.

    A recipe that fails stops no other: its error is part of the result. Raises QConvertError for what concerns them all: a
    quantizer that is not known, an output that exists, the model, the data, the disk. Outputs are published when all
    recipes are through, so that the same command resumes what was interrupted.
    """
    plugins = plugins or preflight.check_comparison(recipes)
    checked_device(next(iter(recipes.values())).device)
    attempts = [Attempt(name, recipe, plugins.quantizer(recipe.worker, recipe.options)) for name, recipe in recipes.items()]
    folder = attempts[0].recipe.output.parent
    with staged(progress) as progress, ExitStack() as stages:
        # What a recipe of its own wants of the model is its own affair.
        anyones = attempts[0].recipe.model_copy(update={"gates": (), "budget": None, "logits": "all", "layout": "onnx"})
        model = load_model(anyones, plugins, progress)
        jobs = _jobs(attempts, model, plugins, progress)
        shared = [_open(attempt, job, stages) for attempt, job in jobs]
        if shared:
            quantize_blocks(shared, progress)
        for each in shared:
            each.make_report(progress)
        for attempt in attempts:
            if attempt.is_planned and attempt.calibrates_alone:
                with attempt.guarded():
                    named = Named(attempt.name, progress)
                    attempt.report = convert(attempt.recipe, named)
                    attempt.seconds = named.seconds("quantize")
        for each in shared:
            each.publish(plugins)
    comparison = Comparison(model.name, model.task, tuple(attempt.entry for attempt in attempts))
    _write(comparison, folder)
    return comparison


@dataclass
class Attempt:
    """A recipe, and what has become of it so far."""

    name: str
    recipe: Recipe
    quantizer: Quantizer
    is_planned: bool = False
    report: Report | None = None
    error: QConvertError | None = None
    seconds: float | None = 0.0

    @property
    def calibrates_alone(self) -> bool:
        """Whether it must run the blocks in a way of its own: on what its quantized blocks give, with gradients, or to decide
        on schemes; or has a model of its own, with batch norms folded for static activations.
        """
        own_way = self.recipe.sequential or self.recipe.tuning is not None or self.recipe.quantizer == AUTO
        return own_way or is_static(self.recipe, self.quantizer)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Let what is raised within the context end this recipe alone."""
        try:
            yield
        except Exception as error:
            self.error = told(error)
            logger.warning("recipe %s: %s", self.name, self.error)
            logger.debug("recipe %s", self.name, exc_info=True)

    @property
    def entry(self) -> Entry:
        """The attempt's entry in compare.json, as far as it has come."""
        scheme = self.recipe.budget or str(self.recipe.cast or self.recipe.scheme or self.quantizer.default_scheme)
        return Entry(self.name, self.recipe.quantizer, scheme, self.report, self.error, self.seconds if self.report else None)


class SharedConversion(Conversion):
    """An attempt whose plan stands: takes its part of the blocks that are calibrated for all, until it fails."""

    def __init__(self, attempt: Attempt, job: Job, origin: Origin, stage: Stage) -> None:
        super().__init__(job, origin, stage)
        self.attempt = attempt
        if self.participant.done:  # the time that an earlier run took for them is not known
            attempt.seconds = None

    @property
    def is_over(self) -> bool:
        """Whether the attempt has failed."""
        return self.attempt.error is not None

    def take(self, block: Block) -> None:
        """Quantize and write this recipe's part of a block."""
        if self.is_over or block.name not in self.participant.units:
            return
        start = time.perf_counter()
        with self.attempt.guarded():
            super().take(self.participant.part_of(block))
        if self.attempt.seconds is not None:
            self.attempt.seconds += time.perf_counter() - start

    def make_report(self, progress: Progress) -> None:
        """Export and verify what was written."""
        if not self.is_over:
            with self.attempt.guarded():
                self.attempt.report = self.finish(Named(self.attempt.name, progress))

    def publish(self, plugins: PluginManager) -> None:
        """Put the artifact in its place. Until then there is no report of it."""
        report, self.attempt.report = self.attempt.report, None
        if report is not None:
            with self.attempt.guarded():
                self.stage.publish()
                self.attempt.report = report
                plugins.conversion_finished(self.job.recipe, report)
                verdict.refuse_unverified(report, self.job.recipe)


@dataclass(frozen=True)
class Named:
    """Progress of one recipe among several."""

    name: str
    progress: Progress
    begun: dict[str, float] = field(default_factory=dict)

    def seconds(self, stage: str) -> float:
        """Return the seconds from the last begin of a stage to that of the stage after it."""
        start = self.begun[stage]
        return min(later for later in self.begun.values() if later > start) - start

    def stage(self, name: str, total: int | None) -> None:
        """Begin a stage, shown with the recipe's name before it, and note the time."""
        self.begun[name] = time.perf_counter()
        self.progress.stage(f"{self.name}: {name}", total)

    def advance(self, n: int = 1) -> None:
        """Pass `n` steps on."""
        self.progress.advance(n)


def _jobs(attempts: Sequence[Attempt], model: Model, plugins: PluginManager, progress: Progress) -> list[tuple[Attempt, Job]]:
    """Return the jobs that are calibrated together. Every attempt that can be planned is marked so."""
    samples = _samples(model, attempts, plugins)
    require_room({"trace": trace_peak(model)}, model)
    template, digests = open_model(model, samples, progress)
    jobs = []
    for each in attempts:
        with each.guarded():
            plan = outline(each.recipe, each.quantizer, model, template)
            require_room(plan.peaks, model)
            each.is_planned = True
            own = samples if plan.calibrated else replace(samples, calibration=())
            estimator = plugins.range_estimator(each.recipe.ranges)
            used = estimator if plan.is_static else None
            code = plugins.code_of(each.quantizer, None, used)  # who tunes blocks is calibrated alone
            job = Job(
                *(each.recipe, each.recipe, each.quantizer, model, template, plan, own, digests, code),
                range_estimator=used,
            )
            if not each.calibrates_alone:
                jobs.append((each, job))
    return jobs


def _samples(model: Model, attempts: Sequence[Attempt], plugins: PluginManager) -> Samples:
    """Draw the samples for all recipes that are calibrated together."""
    together = [each for each in attempts if not each.calibrates_alone]
    if not together:
        return Samples((), ())
    calibrated = any(calibrates(each.recipe, each.quantizer) for each in together)
    return read_samples(model, together[0].recipe, calibrated, plugins.find_data)


def _open(attempt: Attempt, job: Job, stages: ExitStack) -> SharedConversion:
    """The conversion in its stage, which is open until `stages` ends."""
    origin = origin_of(job)
    conversion = SharedConversion(attempt, job, origin, stages.enter_context(opened_stage(job, origin)))
    stages.callback(conversion.close)
    return conversion


def _write(comparison: Comparison, folder: Path) -> None:
    """compare.json, and compare.png where there is something to draw."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PLOT).unlink(missing_ok=True)
    replace_file(folder / FILE, (json.dumps(comparison.document(), indent=2) + "\n").encode())
    if comparison.points:
        replace_file(folder / PLOT, plot(comparison))
