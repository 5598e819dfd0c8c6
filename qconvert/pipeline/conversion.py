"""The main job: prepare, then calibrate, quantize and write block after block, export, verify, publish."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from typing import TYPE_CHECKING

from qconvert.calibrate import Participant, cache_scales, calibrate, static_ranges
from qconvert.errors import UsageError
from qconvert.execution.materialize import ReadParameter
from qconvert.export import export
from qconvert.ir.activation_codes import NO_CODES
from qconvert.ir.layer import Block
from qconvert.ir.progress import Progress, silent
from qconvert.ir.report import Report
from qconvert.job import Job
from qconvert.pipeline import preflight, verdict
from qconvert.pipeline.preparation import prepare
from qconvert.pipeline.staged import staged
from qconvert.pipeline.training import trainable
from qconvert.pipeline.verify_process import verify_in_fresh_process
from qconvert.plugin.host.manager import PluginManager
from qconvert.quantize import quantize
from qconvert.recipe import Recipe
from qconvert.report.files import write_report
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.storage.stage import Stage, open_stage
from qconvert.training import save_trained
from qconvert.write import Writer, run_digest, write_manifest
from qconvert.write.origin import Origin, origin_of

if TYPE_CHECKING:
    from qconvert.training import Module


def convert(
    recipe: Recipe, progress: Progress = silent, plugins: PluginManager | None = None, *, module: Module | None = None
) -> Report:
    """Turn a checkpoint into an artifact, prove that it works, publish it and say how good it is.

    plugins: what `preflight.check` gave who has asked it already.
    module: what `prepare_qat` made of the recipe's model, trained. Its codes are taken as they are; they are kept beside the
        output, in OUTPUT.trained.safetensors, which then is what the artifact was made from.

    Raises QConvertError; unless it is a TargetError, the output folder is then what it was before.
    """
    if module is not None:
        recipe = _saved(module, recipe)
    plugins = plugins or preflight.check(recipe)
    with staged(progress) as progress:
        job = prepare(recipe, plugins, progress)
        origin = origin_of(job)
        with opened_stage(job, origin) as stage, closing(Conversion(job, origin, stage)) as conversion:
            quantize_blocks([conversion], progress)
            report = conversion.finish(progress)
            stage.publish()
    plugins.conversion_finished(recipe, report)
    verdict.refuse_unverified(report, recipe)
    return report


def _saved(module: Module, recipe: Recipe) -> Recipe:
    """Save a trained module, unless its file would replace one without leave, and return the recipe that takes it."""
    path = recipe.output.with_name(f"{recipe.output.name}.trained.safetensors")
    recipe = trainable(recipe, path)
    if path.exists() and not recipe.force:
        raise UsageError("QC-OUTPUT-004", f"there is {path} already", hint="give force to replace it, or another output")
    save_trained(module, path)
    return recipe


class Conversion:
    """A job in its stage: takes block after block, then makes an artifact of them."""

    def __init__(self, job: Job, origin: Origin, stage: Stage) -> None:
        self.job, self.origin, self.stage = job, origin, stage
        stage.require_space(job.plan.weights_bytes + job.plan.cuda_bytes)
        self.writer = Writer(job, stage)  # takes the space: the next conversion sees what is left
        self.participant = Participant(job, frozenset(stage.done_blocks()))

    @property
    def is_over(self) -> bool:
        """Whether it takes no further blocks."""
        return False

    def take(self, block: Block) -> None:
        """Quantize a block and write it."""
        self.writer.append(quantize(block, self.job))

    def finish(self, progress: Progress) -> Report:
        """Make of the written weights what can be published. Raises ParityError, and then the stage is gone."""
        job, stage = self.job, self.stage
        written = self.writer.finish()
        weights = ArtifactReader(stage.folder, job.model, job.plan, dict(written.tensors))
        ranges, scales = static_ranges(job, weights, progress), cache_scales(job, weights, progress)
        written = replace(written, activations=ranges)
        progress.stage("export", None)
        export(job, written, stage, codes=ranges.codes if ranges else NO_CODES, cache_scales=scales)
        write_manifest(stage, job.recipe, self.origin, written)
        if job.recipe.verify:
            report = verify_in_fresh_process(job.recipe, stage.folder, stage.scratch, progress)
        else:
            report = verdict.make_report(job, stage.folder, evidence=None)
        if not verdict.is_right(report):
            stage.discard()
            raise verdict.wrong(report)
        write_report(report, job.asked, job.model.name, stage.folder)
        return report

    def close(self) -> None:
        """Let go of the files."""
        self.writer.close()


def opened_stage(job: Job, origin: Origin) -> AbstractContextManager[Stage]:
    """Open the stage of a job, in which an earlier run of the same job is resumed."""
    inputs = (*job.model.input_paths, *job.samples.files.values(), *job.recipe.plugins)
    return open_stage(job.recipe.output, run_digest(job.recipe, origin), force=job.recipe.force, inputs=inputs)


def quantize_blocks(conversions: Sequence[Conversion], progress: Progress) -> None:
    """Calibrate the blocks of a model, one in memory at a time, and hand each to all conversions.

    Every conversion has written a block when the next one is asked for: sequential calibration reads it.
    """
    job, stage = conversions[0].job, conversions[0].stage
    progress.stage("quantize", len(job.model.blocks) or 1)

    def written() -> ReadParameter:
        return ArtifactReader(stage.folder, job.model, job.plan, stage.tensors()).read

    participants = [conversion.participant for conversion in conversions]
    for block in calibrate(participants, written if job.recipe.sequential else None):
        for conversion in conversions:
            conversion.take(block)
        if all(conversion.is_over for conversion in conversions):
            return
        del block  # or it would be in memory together with the next
        progress.advance()
