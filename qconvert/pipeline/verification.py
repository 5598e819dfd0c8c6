"""Verification of a folder: what a run does before it publishes, and `qconvert verify` afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qconvert.calibrate import read_samples
from qconvert.errors import InputError
from qconvert.ir.model import Model
from qconvert.ir.progress import Progress, silent
from qconvert.ir.report import Report
from qconvert.pipeline import preflight, verdict
from qconvert.pipeline.preparation import reading_job
from qconvert.pipeline.staged import staged
from qconvert.plugin.host.manager import PluginManager
from qconvert.recipe import Recipe
from qconvert.recipe.gates import Gate
from qconvert.report.files import complete_report
from qconvert.storage.published import published_recipe
from qconvert.verify import check_digests
from qconvert.verify import verify as verify_artifact


def verify(
    folder: Path,
    targets: Sequence[str] = (),
    evaluation: str | None = None,
    gates: Sequence[Gate] = (),
    progress: Progress = silent,
    plugins: PluginManager | None = None,
) -> Report:
    """Run a published artifact again; what is not given is taken from the recipe in its manifest.

    Where the folder's report.json says less, that nothing was run or not everywhere, it is written again, and so is the card.
    """
    plugins = plugins or preflight.check_published(folder, targets, evaluation, gates)
    recipe = published_recipe(folder, targets, evaluation, gates)
    try:
        with staged(progress) as progress:
            report, model = _measure(folder, recipe, progress, plugins)
    except InputError as error:
        if not error.code.startswith("QC-INPUT-"):
            raise
        raise verdict.without_source(folder, error) from error
    complete_report(report, published_recipe(folder, (), evaluation, gates), model.name, folder)
    if not verdict.is_right(report):
        raise verdict.wrong(report)
    verdict.refuse_unverified(report, recipe)
    return report


def measure(folder: Path, recipe: Recipe, progress: Progress) -> Report:
    """Report on an artifact that `recipe` made, from its files and its float source alone."""
    with staged(progress) as progress:
        return _measure(folder, recipe, progress, preflight.plugins_of(recipe))[0]


def _measure(folder: Path, recipe: Recipe, progress: Progress, plugins: PluginManager) -> tuple[Report, Model]:
    """`measure`, and the float source."""
    progress.stage("check files", None)
    check_digests(folder)
    job = reading_job(recipe, plugins, progress)
    # What it was calibrated on need not be there any more.
    job = replace(job, samples=read_samples(job.model, recipe, False, plugins.find_data))
    return verdict.make_report(job, folder, verify_artifact(folder, job, progress)), job.model
