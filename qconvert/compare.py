"""Several recipes on one model: loaded, traced and calibrated once, then each an artifact of its own."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from qconvert import pipeline, preflight, verdict
from qconvert.calibrate import Share, calibrate_together, read_samples
from qconvert.errors import QConvertError, unexpected
from qconvert.execution.block_runner import checked_device
from qconvert.ir.comparison import FILE, PLOT, Comparison, Entry
from qconvert.ir.layer import Block
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.progress import Progress, silent
from qconvert.ir.report import Report
from qconvert.ir.samples import Samples
from qconvert.ir.template import Template
from qconvert.plan import calibrates
from qconvert.plugin.host.manager import PluginManager
from qconvert.plugin.quantizer import Quantizer
from qconvert.quantize import quantize_block
from qconvert.recipe import Recipe
from qconvert.report.plot import plot
from qconvert.storage.disk import disk_errors, replace_file
from qconvert.storage.stage import Stage
from qconvert.vocabulary import AUTO
from qconvert.write import Writer

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
    # What a recipe of its own wants of the model is its own affair.
    model = pipeline.load_model(attempts[0].recipe.model_copy(update={"gates": (), "logits": "all"}), plugins, progress)
    samples = _samples(model, attempts, plugins)
    template, digests = pipeline.open_model(model, samples, progress)
    for attempt in attempts:
        with attempt.guarded():
            attempt.plan = pipeline.outline(attempt.recipe, attempt.quantizer, model, template)
    together = _jobs(attempts, plugins, model, template, samples, digests)
    with ExitStack() as stages:
        conversions = [_open(attempt, job, stages) for attempt, job in together]
        if conversions:
            _quantize(conversions, progress)
        for conversion in conversions:
            conversion.finish(progress)
        for attempt in attempts:
            if attempt.plan and attempt.calibrates_alone:
                with attempt.guarded():
                    named = Named(attempt.name, progress)
                    attempt.report = pipeline.convert(attempt.recipe, named)
                    attempt.seconds = named.seconds("quantize")
        for conversion in conversions:
            conversion.publish(plugins)
    comparison = Comparison(model.name, model.task, tuple(attempt.entry for attempt in attempts))
    _write(comparison, folder)
    return comparison


@dataclass
class Attempt:
    """A recipe, and what has become of it so far."""

    name: str
    recipe: Recipe
    quantizer: Quantizer
    plan: Plan | None = None
    report: Report | None = None
    error: QConvertError | None = None
    seconds: float | None = 0.0

    @property
    def calibrates_alone(self) -> bool:
        """Whether it runs blocks in a way of its own: on what its quantized blocks give, with gradients, or to decide on
        schemes."""
        return self.recipe.sequential or self.recipe.tuning is not None or self.recipe.quantizer == AUTO

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What is raised is the end of this recipe alone."""
        try:
            yield
        except Exception as error:
            self.error = error if isinstance(error, QConvertError) else unexpected(error)
            logger.warning("recipe %s: %s", self.name, self.error)
            logger.debug("recipe %s", self.name, exc_info=True)

    @property
    def entry(self) -> Entry:
        scheme = self.recipe.budget or str(self.recipe.scheme or self.quantizer.default_scheme)
        return Entry(self.name, self.recipe.quantizer, scheme, self.report, self.error, self.seconds if self.report else None)


class Conversion:
    """An attempt whose plan stands, in its stage: takes the blocks that are calibrated for all."""

    def __init__(self, attempt: Attempt, job: pipeline.Job, stage: Stage) -> None:
        self.attempt = attempt
        self.job = job
        self.stage = stage
        done = frozenset(stage.done_blocks())
        if done:  # the time that an earlier run took for them is not known
            attempt.seconds = None
        stage.require_space(job.plan.weights_bytes + job.plan.cuda_bytes)
        self.writer = Writer(job.model, job.plan, stage, job.recipe.layout)  # takes the space: the next one sees what is left
        self.share = Share(job.model, job.plan, job.template.groups, job.quantizer, done)

    def take(self, block: Block) -> None:
        """Quantize and write this recipe's part of a block."""
        if self.attempt.error or block.name not in self.share.units:
            return
        start = time.perf_counter()
        with self.attempt.guarded():
            part = self.share.of(block)
            keep_unfolded = self.job.recipe.layout == "onnx"
            self.writer.append(quantize_block(part, self.job.plan, self.job.quantizer, keep_unfolded=keep_unfolded))
        if self.attempt.seconds is not None:
            self.attempt.seconds += time.perf_counter() - start

    def finish(self, progress: Progress) -> None:
        """Export and verify what was written."""
        if not self.attempt.error:
            with self.attempt.guarded():
                written = self.writer.finish()
                self.attempt.report = pipeline.finish(self.job, written, self.stage, Named(self.attempt.name, progress))

    def publish(self, plugins: PluginManager) -> None:
        report, self.attempt.report = self.attempt.report, None  # until its artifact is there
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
        """From the last begin of a stage to that of the stage after it."""
        start = self.begun[stage]
        return min(later for later in self.begun.values() if later > start) - start

    def stage(self, name: str, total: int | None) -> None:
        self.begun[name] = time.perf_counter()
        self.progress.stage(f"{self.name}: {name}", total)

    def advance(self, n: int = 1) -> None:
        self.progress.advance(n)


def _samples(model: Model, attempts: Sequence[Attempt], plugins: PluginManager) -> Samples:
    """What the recipes that are calibrated together are calibrated on."""
    together = [each for each in attempts if not each.calibrates_alone]
    if not together:
        return Samples((), ())
    calibrated = any(calibrates(each.recipe, each.quantizer) for each in together)
    return read_samples(model, together[0].recipe, calibrated, plugins.find_data)


def _jobs(
    attempts: Sequence[Attempt],
    plugins: PluginManager,
    model: Model,
    template: Template,
    samples: Samples,
    digests: Mapping[str, str],
) -> list[tuple[Attempt, pipeline.Job]]:
    """What is calibrated together."""
    jobs = []
    for each in attempts:
        if each.plan and not each.calibrates_alone:
            own = samples if each.plan.calibrated else replace(samples, calibration=())
            parts = (each.quantizer, model, template, each.plan, own, digests, plugins.code_of(each.quantizer))
            jobs.append((each, pipeline.Job(each.recipe, each.recipe, *parts)))
    return jobs


def _open(attempt: Attempt, job: pipeline.Job, stages: ExitStack) -> Conversion:
    """The conversion in its stage, which is open until `stages` ends."""
    conversion = Conversion(attempt, job, stages.enter_context(job.open_stage()))
    stages.callback(conversion.writer.close)
    return conversion


def _quantize(conversions: Sequence[Conversion], progress: Progress) -> None:
    """Hand every block to all conversions, one after the other, as long as one is left that has not failed."""
    job = conversions[0].job
    calibration = next((each.job.samples.calibration for each in conversions if each.job.plan.calibrated), ())
    progress.stage("quantize", len(job.model.blocks) or 1)
    blocks = calibrate_together([each.share for each in conversions], calibration, job.recipe.device)
    for block in blocks:
        for conversion in conversions:
            conversion.take(block)
        if all(conversion.attempt.error for conversion in conversions):
            return
        del block  # or it would be in memory together with the next
        progress.advance()


def _write(comparison: Comparison, folder: Path) -> None:
    """compare.json, and compare.png where there is something to draw."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PLOT).unlink(missing_ok=True)
    replace_file(folder / FILE, (json.dumps(comparison.document(), indent=2) + "\n").encode())
    if comparison.points:
        replace_file(folder / PLOT, plot(comparison))
