"""The way from a recipe to a job: load, trace, plan, and decide on the schemes where a budget asks for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from qconvert.allocate import allocate, keep_within
from qconvert.calibrate import Participant, calibrate, read_samples, value_codes
from qconvert.execution.block_runner import checked_device
from qconvert.ir.decision import Assignment
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.progress import Progress, silent
from qconvert.ir.samples import Samples
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import Template
from qconvert.job import Job
from qconvert.load import load
from qconvert.load.adapted import with_adapter
from qconvert.load.trained import as_trained, with_trained
from qconvert.pipeline import preflight
from qconvert.pipeline.room import require_room
from qconvert.pipeline.staged import staged
from qconvert.plan import calibrates, check, is_static
from qconvert.plan import plan as make_plan
from qconvert.plan.peaks import trace_peak
from qconvert.plugin.host.manager import PluginManager
from qconvert.plugin.host.stand_ins import TrainedCodes
from qconvert.plugin.quantizer import Quantizer
from qconvert.quantize import on_trial
from qconvert.recipe import Recipe
from qconvert.storage.output import check_output
from qconvert.trace import sketch, trace
from qconvert.trace.batch_norm import without_batch_norms
from qconvert.write.origin import file_digests

# What layers are planned with before a budget has decided: it fits every width.
UNDECIDED = QuantScheme.parse("int4-channel")

Tracing = Callable[[Model], Template]


def prepare(recipe: Recipe, plugins: PluginManager, progress: Progress) -> Job:
    """Prepare the job of a conversion.

    Raises what can be wrong with recipe, model, data and output before a weight is quantized.
    """
    checked_device(recipe.device)
    quantizer, tuner = plugins.quantizer(recipe.worker, recipe.options), plugins.tuner(recipe.tuning)
    range_estimator = plugins.range_estimator(recipe.ranges)
    model = load_model(recipe, plugins, progress)
    if model.trained is not None:
        quantizer = TrainedCodes(model.trained)
    require_room({"trace": trace_peak(model)}, model)
    check_output(recipe.output, force=recipe.force, inputs=model.input_paths)
    samples = read_samples(model, recipe, calibrates(recipe, quantizer), plugins.find_data)
    template, digests = open_model(model, samples, progress)
    model, template = ready_for_ranges(recipe, quantizer, model, template)
    plan = outline(recipe, quantizer, model, template)
    require_room(plan.peaks, model)
    used = range_estimator if plan.is_static and model.trained is None else None
    code = plugins.code_of(quantizer, tuner, used)
    job = Job(recipe, recipe, quantizer, model, template, plan, samples, digests, code, tuner, used)
    return decided(job, progress)


def plan(recipe: Recipe, plugins: PluginManager | None = None) -> Plan:
    """Plan what `convert` would do, from the headers and one block of each kind; with a budget, also from all that its decision
    takes.

    Raises what `convert` would raise before it quantizes anything, but for an output folder that is there and what is wrong in
    the weights of a large model: they are not read.
    """
    plugins = plugins or preflight.check(recipe, writes=False)
    checked_device(recipe.device)
    with staged(silent) as progress:
        decides = recipe.budget is not None
        job = reading_job(recipe, plugins, progress, trace if decides else sketch)
        if decides:
            estimator = plugins.range_estimator(recipe.ranges) if job.plan.is_static else None
            samples = read_samples(job.model, recipe, True, plugins.find_data)
            job = replace(job, samples=samples, range_estimator=estimator)
        return decided(job, progress).plan


def reading_job(recipe: Recipe, plugins: PluginManager, progress: Progress, tracing: Tracing | None = None) -> Job:
    """Return a job that writes nothing and has no samples. tracing: unset, `trace`."""
    quantizer = plugins.quantizer(recipe.worker, recipe.options)
    model = load_model(recipe, plugins, progress)
    progress.stage("trace", None)
    model, template = ready_for_ranges(recipe, quantizer, model, (tracing or trace)(model))
    made = outline(recipe, quantizer, model, template)
    return Job(recipe, recipe, quantizer, model, template, made, Samples((), ()))


def load_model(recipe: Recipe, plugins: PluginManager, progress: Progress) -> Model:
    """Load the model of a recipe, if the recipe can be carried out with it."""
    progress.stage("load", None)
    model = load(recipe.model, plugins.load_model)
    check(model, recipe)
    if recipe.adapter is not None:
        model = with_adapter(model, recipe.adapter, merged=recipe.merge_adapter)
    return model if recipe.trained is None else with_trained(model, recipe.trained)


def open_model(model: Model, samples: Samples, progress: Progress) -> tuple[Template, Mapping[str, str]]:
    """Trace a model, and return the trace with the sha256 of every file that the model and the data are read from."""
    progress.stage("trace", None)
    data = {f"{role}:{path.name}": path for role, path in samples.files.items()}
    with ThreadPoolExecutor(1) as background:  # hashing leaves the interpreter to the trace
        digests = background.submit(file_digests, {**model.input_files, **data})
        template = trace(model)
    return template, digests.result()


def ready_for_ranges(recipe: Recipe, quantizer: Quantizer, model: Model, template: Template) -> tuple[Model, Template]:
    """Return model and template with batch norms as parts of convolutions, where static activations want that or training
    has done that, and the weights that were trained.
    """
    if model.trained is not None:
        model, template = without_batch_norms(model, template)
        return as_trained(model), template
    return without_batch_norms(model, template) if is_static(recipe, quantizer) else (model, template)


def outline(recipe: Recipe, quantizer: Quantizer, model: Model, template: Template) -> Plan:
    """Plan what is to be done as far as it is known before calibration: a budget has not decided on any scheme then."""
    if recipe.budget is not None and recipe.loss_budget is None:  # whether the layout takes what is decided is known then
        recipe = recipe.decided(UNDECIDED).model_copy(update={"layout": "onnx"})
    return make_plan(model, template, recipe, quantizer)


def decided(job: Job, progress: Progress) -> Job:
    """Return the job with the schemes that a budget decides on, where its recipe has one."""
    if job.recipe.budget is None:
        return job
    # Losses are measured on float blocks, whatever is done to the quantized ones afterwards.
    measured = replace(job, recipe=job.recipe.model_copy(update={"tuning": None, "sequential": False}), tuner=None)
    if job.recipe.loss_budget is None:
        recipe, assignment = allocate(calibrate([Participant(measured)]), job, progress)
    else:
        recipe, assignment = _kept_within(job, measured, progress)
    made = make_plan(job.model, job.template, recipe, job.quantizer)
    return replace(job, recipe=recipe, plan=replace(made, assignment=assignment))


def _kept_within(job: Job, measured: Job, progress: Progress) -> tuple[Recipe, Assignment]:
    """Find the layers that stay in float for a budget on the loss. measured: the job as it is calibrated for that."""
    progress.stage("allocate", len(job.model.blocks) or 1)
    weights = on_trial(calibrate([Participant(measured)]), measured, progress)
    codes = value_codes(measured, weights.reader(lambda name: False), progress)
    return keep_within(job, weights, codes, progress)
