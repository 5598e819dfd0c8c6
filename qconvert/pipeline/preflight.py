"""The checks that need no more than recipe, config and folder: they come before torch, or a model, is loaded.

Nothing heavy is imported here. What only a model can tell is refused when it is loaded, before it is traced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qconvert.errors import InputError, UsageError
from qconvert.ir.comparison import FILE
from qconvert.ir.data_source import BUILTIN, data_file
from qconvert.ir.scheme import no_codebooks, no_kernel, no_zero_points
from qconvert.ir.task import CAUSAL_LM, MODULE, Task
from qconvert.load import package
from qconvert.load.folder import CONFIG, no_folder
from qconvert.plugin.host import calls
from qconvert.plugin.host.manager import PluginManager, plugin_manager
from qconvert.recipe import Recipe
from qconvert.recipe.budget import refuse_budget
from qconvert.recipe.gates import Gate, refuse_gates
from qconvert.storage.output import check_output, recover
from qconvert.storage.published import FACTORY, published_recipe
from qconvert.targets import targets_of

# How classes of models that write text are called; what others are is for the loader to say.
GENERATING_CLASSES = ("ForCausalLM", "LMHeadModel")


def check(recipe: Recipe, *, writes: bool = True) -> PluginManager:
    """Raise what keeps a recipe from being carried out, as far as that is known at once. Gives the plugins that it may use.

    writes: whether an output folder that is there is in its way.

    Raises UsageError QC-OUTPUT-001 to 005, QC-PLUGIN-002 and 009, QC-DATA-002, QC-GATE-002, QC-BUDGET-008, QC-PLAN-001, 007
    and 015, InputError QC-INPUT-001, 020 and 021 and QC-DATA-001, ResourceError QC-LOCK-001, and what plugins raise.
    """
    plugins = plugins_of(recipe)
    _check(recipe, plugins, writes=writes)
    scheme = recipe.quantized_scheme
    if scheme is not None and not recipe.rules:  # else no layer may have it in the end
        if not scheme.has_kernel:
            raise no_kernel(scheme)
        targets = targets_of(recipe.targets)
        if not scheme.symmetric and not all(target.takes_zero_points for target in targets):
            raise no_zero_points(scheme, "the recipe's scheme")
        without = next((target.name for target in targets if not target.takes_codebooks), None)
        if scheme.codebook is not None and without:
            raise no_codebooks(scheme, "the recipe's scheme", without)
    refuse_gates(recipe.gates, _task(recipe.model))
    refuse_budget(recipe.loss_budget, _task(recipe.model))
    return plugins


def check_comparison(recipes: Mapping[str, Recipe]) -> PluginManager:
    """Check, as `check` does, what concerns all recipes of a comparison; what concerns one alone stops no other."""
    first = next(iter(recipes.values()))
    plugins, folder = plugins_of(first), first.output.parent
    if folder.exists() and not folder.is_dir():
        raise UsageError("QC-OUTPUT-003", f"output {folder} is a file", hint="give an --output folder that doesn't exist yet")
    for recipe in recipes.values():
        _check(recipe, plugins)
    if (folder / FILE).exists() and not first.force:
        raise UsageError(
            "QC-OUTPUT-004",
            f"output {folder} holds a {FILE}",
            hint="give --force to replace the comparison, or another --output",
        )
    return plugins


def check_published(folder: Path, targets: Sequence[str], evaluation: str | None, gates: Sequence[Gate]) -> PluginManager:
    """Check, as `check` does, what `verify` is given.

    A float source that is missing is for later: the folder's own files come first.

    Raises InputError QC-READ-001 for a folder that no run has written, and as `check` for plugins, data and gates.
    """
    recover(folder)
    recipe = published_recipe(folder, targets, evaluation, gates)
    plugins = plugins_of(recipe)
    plugins.require(recipe.worker)
    refuse_gates(recipe.gates, _task(recipe.model))
    judging = recipe.evaluation.source or recipe.calibration.source
    if judging is not None:
        _find_data(judging, plugins)
    return plugins


def plugins_of(recipe: Recipe) -> PluginManager:
    """Return all plugins that a recipe may use. Their calls are limited to its time from now on."""
    calls.limit_calls(recipe.plugin_timeout)
    return plugin_manager(recipe.plugins)


def _check(recipe: Recipe, plugins: PluginManager, *, writes: bool = True) -> None:
    source, data = _place(recipe.model), tuple(_data(recipe, plugins))
    inputs = [
        *recipe.plugins,
        *(path for path in (recipe.trained, recipe.adapter) if path),
        *(Path(name) for name in data),
        *([source] if source else []),
    ]
    replaces = recipe.force or not writes
    check_output(recipe.output, force=replaces, inputs=[path for path in inputs if path.exists()])
    plugins.require(recipe.worker, recipe.tuning, recipe.ranges)
    if recipe.trained is not None and not recipe.trained.is_file():
        raise InputError("QC-TRAIN-003", f"there is no file {recipe.trained}", hint="write it with qconvert.save_trained")
    if recipe.adapter is not None and not recipe.adapter.is_dir():
        raise InputError(
            "QC-ADAPTER-001", f"there is no folder {recipe.adapter}", hint="give what peft's save_pretrained has written"
        )
    if source is not None and recipe.model.startswith(FACTORY) and not source.is_file():
        raise InputError("QC-INPUT-021", f"{recipe.model!r}: there is no file {source}", hint="check the path")
    if source is not None and not (recipe.model.startswith(FACTORY) or source.is_dir()):
        absent = _is_path(recipe.model) and not source.exists()
        if absent or not plugins.load_models:  # which may load files, and know names that are no paths
            raise no_folder(source)
    for name in data:
        _find_data(name, plugins)


def _place(model: str) -> Path | None:
    """The file or folder that a source names; None where it names something else, or nothing at all.

    Raises InputError QC-INPUT-001 and 020 for a pkg: that leads nowhere.
    """
    if not model.strip() or "\0" in model:
        return None
    if model.startswith(package.SCHEME):
        return package.resolve(model)
    if model.startswith(FACTORY):
        file, _, _ = model.removeprefix(FACTORY).rpartition(":")
        return Path(file) if file.endswith(".py") else None
    return Path(model)


def _is_path(model: str) -> bool:
    """Return whether a source can only be a path, as it is written: from the root, a home, this folder or the one above."""
    return Path(model).is_absolute() or model.split("/")[0] in (".", "..", "~")


def _task(model: str) -> Task | None:
    """Return the kind of model that a source is, where that is plain without loading it."""
    if model.startswith(FACTORY):
        return MODULE
    place = _place(model)
    try:
        names = json.loads((place / CONFIG).read_text(encoding="utf-8"))["architectures"] if place else []
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # the loader says what is wrong with it
        return None
    plain = isinstance(names, list) and len(names) == 1 and str(names[0]).endswith(GENERATING_CLASSES)
    return CAUSAL_LM if plain else None


def _data(recipe: Recipe, plugins: PluginManager) -> Iterator[str]:
    """The sources of data that the recipe names and a run of it reads."""
    calibrated = recipe.tuning is not None or plugins.needs_data(recipe.worker)
    judging = recipe.evaluation.source or recipe.calibration.source
    sources = (judging if calibrated or recipe.verify else None, recipe.calibration.source if calibrated else None)
    yield from dict.fromkeys(source for source in sources if source is not None)


def _find_data(source: str, plugins: PluginManager) -> None:
    if source != BUILTIN and not Path(source).is_file() and plugins.find_data(source) is None:
        data_file(source)
