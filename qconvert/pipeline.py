"""The whole story: load, trace, plan, perhaps allocate, calibrate, quantize, write, export, verify."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from qconvert import preflight, verdict
from qconvert.allocate import allocate
from qconvert.calibrate import calibrate, read_samples
from qconvert.errors import InputError
from qconvert.export import export
from qconvert.fresh import verify_in_fresh_process
from qconvert.ir.artifact import Written
from qconvert.ir.dequantized import Artifact
from qconvert.ir.forward import checked_device
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.progress import Progress, silent
from qconvert.ir.report import Report
from qconvert.ir.samples import Samples
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import Template
from qconvert.load import load
from qconvert.output import check_output
from qconvert.plan import calibrates, check
from qconvert.plan import plan as make_plan
from qconvert.plugin.distribution import Code
from qconvert.plugin.manager import PluginManager
from qconvert.plugin.quantizer import Quantizer
from qconvert.published import published_recipe
from qconvert.quantize import quantize
from qconvert.recipe import AUTO, Gate, Recipe
from qconvert.report.files import complete_report, write_report
from qconvert.trace import trace
from qconvert.verify import check_digests
from qconvert.verify import verify as verify_artifact
from qconvert.workdir import Stage, open_stage
from qconvert.write import run_digest, write, write_manifest
from qconvert.write.origin import Origin, file_digests, graph_digests, machine, option_digests, sample_digests, versions

# What layers are planned with before a budget has decided: it fits every width.
UNDECIDED = QuantScheme.parse("int4-channel")


@dataclass(frozen=True, eq=False)
class Job:
    """A recipe, and all that is known before the weights are read.

    asked: the recipe as it was given; `recipe` is what a budget made of it.
    digests: name -> sha256 of the files of the model and of the data (`open_model`).
    code: what the tensors are made by.
    """

    asked: Recipe
    recipe: Recipe
    quantizer: Quantizer
    model: Model
    template: Template
    plan: Plan
    samples: Samples
    digests: Mapping[str, str]
    code: Sequence[Code]

    @cached_property
    def origin(self) -> Origin:
        """What the bytes of the artifact depend on, beside the recipe."""
        unread = () if self.plan.calibrated else ("calibration",) if self.recipe.verify else ("calibration", "evaluation")
        inputs = {
            **{name: digest for name, digest in self.digests.items() if name.partition(":")[0] not in unread},
            **sample_digests(self.samples.calibration),
            **graph_digests(self.model, self.template),
            **option_digests(self.quantizer),
            **{f"code:{code.distribution.name}": code.digest for code in self.code},
        }
        return Origin(inputs, versions(self.code), machine(self.recipe.device))

    def open_stage(self) -> AbstractContextManager[Stage]:
        inputs = (*self.model.input_paths, *self.samples.files.values(), *self.recipe.plugins)
        return open_stage(self.recipe.output, run_digest(self.recipe, self.origin), force=self.recipe.force, inputs=inputs)


def convert(recipe: Recipe, progress: Progress = silent, plugins: PluginManager | None = None) -> Report:
    """Turn a checkpoint into an artifact, prove that it works, publish it and say how good it is.

    plugins: what `preflight.check` gave who has asked it already.

    Raises QConvertError; unless it is a TargetError, the output folder is then what it was before.
    """
    plugins = plugins or preflight.check(recipe)
    checked_device(recipe.device)
    quantizer = plugins.quantizer(recipe.worker, recipe.options)
    model = load_model(recipe, plugins, progress)
    check_output(recipe.output, force=recipe.force, inputs=model.input_paths)
    samples = read_samples(model, recipe, calibrates(recipe, quantizer), plugins.find_data)
    template, digests = open_model(model, samples, progress)
    decided, plan = _decide(recipe, quantizer, model, template, samples, progress)
    job = Job(recipe, decided, quantizer, model, template, plan, samples, digests, plugins.code_of(quantizer))
    with job.open_stage() as stage:
        stage.require_space(plan.weights_bytes + plan.cuda_bytes)
        progress.stage("quantize", len(model.blocks) or 1)
        so_far = (lambda: Artifact(stage.folder, model, plan, stage.tensors()).read) if recipe.sequential else None
        done, tuned = frozenset(stage.done_blocks()), recipe.tuning is not None
        blocks = calibrate(
            model, plan, template.groups, quantizer, samples.calibration, recipe.device, done, written=so_far, tuned=tuned
        )
        quantized = quantize(blocks, plan, quantizer, progress, keep_unfolded=recipe.layout == "onnx", tuning=recipe.tuning)
        written = write(quantized, model, plan, stage, recipe.layout)
        report = finish(job, written, stage, progress)
        stage.publish()
    plugins.conversion_finished(recipe, report)
    verdict.refuse_unverified(report, recipe)
    return report


def finish(job: Job, written: Written, stage: Stage, progress: Progress) -> Report:
    """From written weights to what can be published. Raises ParityError, and then the stage is gone."""
    recipe, model, plan = job.recipe, job.model, job.plan
    progress.stage("export", None)
    narrow = getattr(torch, recipe.cuda_dtype)
    export(job.template, model, plan, written, stage, targets=recipe.targets, cuda_dtype=narrow, logits=recipe.logits)
    write_manifest(stage, recipe, job.origin, written)
    if recipe.verify:
        report = verify_in_fresh_process(recipe, stage.folder, stage.scratch, progress)
    else:
        report = verdict.make_report(recipe, model, plan, job.samples, stage.folder, evidence=None)
    if not verdict.is_right(report):
        stage.discard()
        raise verdict.wrong(report)
    write_report(report, job.asked, model.name, stage.folder)
    return report


def plan(recipe: Recipe, plugins: PluginManager | None = None) -> Plan:
    """What `convert` would do, from the headers and one block of each kind, on which the trace is checked; with a budget, also
    from all that its decision takes.

    Raises what `convert` would raise before it quantizes anything, but for an output folder that is there.
    """
    plugins = plugins or preflight.check(recipe, writes=False)
    checked_device(recipe.device)
    quantizer, model, template = _load(recipe, plugins, silent)
    decides = recipe.quantizer == AUTO
    samples = read_samples(model, recipe, True, plugins.find_data) if decides else Samples((), ())
    return _decide(recipe, quantizer, model, template, samples, silent)[1]


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
    """The report on an artifact that `recipe` made, from its files and its float source alone."""
    return _measure(folder, recipe, progress, preflight.plugins_of(recipe))[0]


def _measure(folder: Path, recipe: Recipe, progress: Progress, plugins: PluginManager) -> tuple[Report, Model]:
    """`measure`, and the float source."""
    progress.stage("check files", None)
    check_digests(folder)
    quantizer, model, template = _load(recipe, plugins, progress)
    plan = outline(recipe, quantizer, model, template)
    samples = read_samples(model, recipe, False, plugins.find_data)  # what it was calibrated on need not be there any more
    loadable = recipe.layout == "transformers" and model.config is not None
    evidence = verify_artifact(
        folder, model, template, plan, samples.evaluation, recipe.targets, progress, with_transformers=loadable
    )
    return verdict.make_report(recipe, model, plan, samples, folder, evidence), model


def load_model(recipe: Recipe, plugins: PluginManager, progress: Progress) -> Model:
    """The model of a recipe, where it is one that the recipe can be carried out with."""
    progress.stage("load", None)
    model = load(recipe.model, plugins.load_model)
    check(model, recipe)
    return model


def open_model(model: Model, samples: Samples, progress: Progress) -> tuple[Template, Mapping[str, str]]:
    """The trace of a model, and the sha256 of every file that it and the data are read from."""
    progress.stage("trace", None)
    data = {f"{role}:{path.name}": path for role, path in samples.files.items()}
    with ThreadPoolExecutor(1) as background:  # hashing leaves the interpreter to the trace
        digests = background.submit(file_digests, {**model.input_files, **data})
        template = trace(model)
    return template, digests.result()


def _load(recipe: Recipe, plugins: PluginManager, progress: Progress) -> tuple[Quantizer, Model, Template]:
    """The quantizer of a recipe, its model and the trace, where nothing is to be written."""
    quantizer = plugins.quantizer(recipe.worker, recipe.options)
    model = load_model(recipe, plugins, progress)
    progress.stage("trace", None)
    return quantizer, model, trace(model)


def outline(recipe: Recipe, quantizer: Quantizer, model: Model, template: Template) -> Plan:
    """What is to be done, as far as it is known before calibration: a budget has not decided on any scheme then."""
    if recipe.quantizer == AUTO:  # whether the layout takes what is decided is known then
        recipe = recipe.decided(UNDECIDED).model_copy(update={"layout": "onnx"})
    return make_plan(model, template, recipe, quantizer)


def _decide(
    recipe: Recipe, quantizer: Quantizer, model: Model, template: Template, samples: Samples, progress: Progress
) -> tuple[Recipe, Plan]:
    """The recipe with the schemes that a budget decides on, where it has one, and its plan."""
    plan = outline(recipe, quantizer, model, template)
    if recipe.quantizer != AUTO:
        return recipe, plan
    blocks = calibrate(model, plan, template.groups, quantizer, samples.calibration, recipe.device)
    decided, assignment = allocate(blocks, model, plan, template.groups, recipe, quantizer, samples.calibration, progress)
    return decided, dataclasses.replace(make_plan(model, template, decided, quantizer), assignment=assignment)
