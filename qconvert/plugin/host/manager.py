"""Asks plugins, and says which one failed.

Built-ins register through the hooks that third parties use, from an explicit tuple of module names. Every hook is called
plugin by plugin, so that what one of them raises has a name and stops no other.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from qconvert.errors import PluginError, QConvertError
from qconvert.plugin import hookspecs
from qconvert.plugin.host import calls
from qconvert.plugin.host.discovery import (
    FAILURES,
    BrokenPlugin,
    Plugin,
    broken,
    check_hooks,
    discovered,
    hook_functions,
    reason,
)
from qconvert.plugin.host.distribution import Code, Distribution, builtin, code_digest, distribution_of
from qconvert.plugin.host.families import FAMILIES, QUANTIZERS, RANGE_ESTIMATORS, TUNERS, Family, Registered
from qconvert.vocabulary import CAST, RANGES, TRAINED, TUNER

if TYPE_CHECKING:
    from qconvert.ir.model import Model
    from qconvert.ir.report import Report
    from qconvert.plugin.quantizer import Quantizer
    from qconvert.plugin.range_estimator import RangeEstimator
    from qconvert.plugin.tuner import BlockTuner
    from qconvert.recipe import Recipe
    from qconvert.recipe.fields import Ranges, Tuning

logger = logging.getLogger(__name__)

BUILTINS = (
    "qconvert.quantizers.absmax",
    "qconvert.quantizers.zero_point",
    "qconvert.quantizers.per_channel",
    "qconvert.quantizers.hqq",
    "qconvert.quantizers.nf4",
    "qconvert.quantizers.awq",
    "qconvert.quantizers.gptq",
    "qconvert.quantizers.llm_int8",
    "qconvert.quantizers.smoothquant",
)
# Of the quantizers, those that need calibration data: told here, so that nobody has to import torch to know.
CALIBRATED = ("awq", "gptq", "llm-int8", "smoothquant")


def plugin_manager(files: Sequence[Path] = ()) -> PluginManager:
    """Return the manager of all plugins of this environment, and of those in `files`."""
    return PluginManager(BUILTINS, files)


class PluginManager:
    """The plugins of one run.

    broken: plugins that could not be used, each logged once as a warning; the rest works.
    """

    def __init__(self, builtins: Sequence[str], files: Sequence[Path] = ()) -> None:
        """Raises UsageError QC-PLUGIN-009 for a file that does not exist."""
        self.broken: list[BrokenPlugin] = []
        self.plugins: list[Plugin] = []
        self._loader: Plugin | None = None
        self._hooks = pluggy.PluginManager("qconvert")
        self._hooks.add_hookspecs(hookspecs)
        self._builtins = {family: family.builtins for family in FAMILIES} | {QUANTIZERS: tuple(builtins)}
        # All are imported before anything is said: where one crashes the process, this begins again without it.
        for found in tuple(discovered(files)):
            if isinstance(found, BrokenPlugin):
                self._set_aside(found)
                continue
            try:
                self._register(found)
            except FAILURES as error:
                self._set_aside(broken(found.distribution, found.value, error, found.implementation))

    def quantizer(self, name: str, options: Mapping[str, object]) -> Quantizer:
        """Return the quantizer that registered as `name`, with the user's options.

        Raises UsageError QC-PLUGIN-002 if none did, QC-PLUGIN-004 for wrong options; PluginError QC-PLUGIN-001 if none
        did but a broken plugin may have been meant to, QC-PLUGIN-003 if two did, QC-PLUGIN-005 if it can't be built.
        """
        if name in (CAST, TRAINED):
            from qconvert.plugin.host.stand_ins import STAND_INS

            return STAND_INS[name]()
        quantizer: Quantizer = self._built(QUANTIZERS, self.quantizers, name, options)
        return quantizer

    def tuner(self, tuning: Tuning | None) -> BlockTuner | None:
        """The tuner that a recipe asks for, None for a recipe that asks for none. Raises what `quantizer` raises."""
        if tuning is None:
            return None
        tuner: BlockTuner = self._built(TUNERS, self.tuners, tuning.tuner, tuning.settings)
        return tuner

    def range_estimator(self, ranges: Ranges | None) -> RangeEstimator:
        """The range estimator that a recipe asks for, or the default one. Raises what `quantizer` raises."""
        name, options = (ranges.estimator, ranges.options) if ranges else (RANGES, {})
        estimator: RangeEstimator = self._built(RANGE_ESTIMATORS, self.range_estimators, name, options)
        return estimator

    @property
    def load_models(self) -> bool:
        """Whether a plugin may know sources that nobody else does."""
        return any("load_model" in hook_functions(plugin.implementation) for plugin in self.plugins)

    def load_model(self, source: str) -> Model | None:
        """Load `source` with the first plugin that knows it; None if none does.

        Raises PluginError QC-PLUGIN-006 if a plugin raises, or returns what is no complete Model; its own QConvertErrors pass.
        """
        from qconvert.plugin.host.loader_contract import PluginSource, model_problems

        model: Model | None
        plugin, model = self._first("load_model", source, model_problems)
        self._loader = plugin
        if plugin is None or model is None or distribution_of(model.source) == builtin():
            return model
        return dataclasses.replace(model, source=PluginSource(model.source, plugin.distribution))

    def find_data(self, source: str) -> Path | None:
        """Return the file that the first plugin which knows `source` names for it, None if none does.

        Raises PluginError QC-PLUGIN-006 if a plugin raises, or returns what is no file; its own QConvertErrors pass.
        """
        from qconvert.plugin.host.loader_contract import data_problems

        _, path = self._first("find_data", source, data_problems)
        found: Path | None = path
        return found

    def conversion_finished(self, recipe: Recipe, report: Report) -> None:
        """Tell every plugin. One that fails, or changes the output, is a warning: the output is published and stays."""
        finishers = [each for each in self.plugins if "conversion_finished" in hook_functions(each.implementation)]
        for plugin in reversed(finishers):
            before = _files(recipe.output)
            try:
                self._ask(plugin, "conversion_finished", recipe=recipe, report=report)
            except FAILURES as error:
                logger.warning("plugin %s failed after the conversion: %s", plugin.distribution, reason(error))
            changed = sorted({name for name, _ in before.items() ^ _files(recipe.output).items()})
            if changed:
                logger.warning(
                    "plugin %s changed the published output, which it must not: %s", plugin.distribution, ", ".join(changed)
                )

    def distribution_of(self, quantizer: Quantizer) -> Distribution:
        """Return name and version of the distribution that a quantizer came from."""
        return distribution_of(quantizer)

    def code_of(
        self, quantizer: Quantizer, tuner: BlockTuner | None, range_estimator: RangeEstimator | None
    ) -> tuple[Code, ...]:
        """The code that the bytes of an artifact come from: of those of these parts that it uses, and of the model's loader."""
        parts = [part for part in (quantizer, tuner, range_estimator) if part is not None]
        found = [Code(distribution_of(part), code_digest(type(part).__module__)) for part in parts]
        if self._loader is not None:
            implementation = self._loader.implementation
            module = getattr(implementation, "__name__", type(implementation).__module__)
            found.append(Code(self._loader.distribution, code_digest(module)))
        return tuple(dict.fromkeys(found))

    def require(self, name: str, tuning: Tuning | None = None, ranges: Ranges | None = None) -> None:
        """Raises what `quantizer`, `tuner` and `range_estimator` raise for a name that nobody brings; qconvert's own are not
        imported for that."""
        named = {QUANTIZERS: name, TUNERS: tuning.tuner if tuning else TUNER}
        named[RANGE_ESTIMATORS] = ranges.estimator if ranges else RANGES
        for family, wanted in named.items():
            if wanted not in self._own_names(family) | family.reserved and wanted not in self._brought[family]:
                raise self.unknown(wanted, family)

    def needs_data(self, name: str) -> bool:
        """Whether the quantizer `name` needs calibration data."""
        if name in self._own_names(QUANTIZERS):
            return name in CALIBRATED
        return any(kind.observers for kind, _ in self._brought[QUANTIZERS].get(name, ()))

    @cached_property
    def quantizers(self) -> Registered:
        """Every quantizer by name, and who registered it."""
        return self._all(QUANTIZERS)

    @cached_property
    def tuners(self) -> Registered:
        """Every tuner by name, and who registered it."""
        return self._all(TUNERS)

    @cached_property
    def range_estimators(self) -> Registered:
        """Every range estimator by name, and who registered it."""
        return self._all(RANGE_ESTIMATORS)

    def _built(self, family: Family, registered: Registered, name: str, options: Mapping[str, object]) -> Any:
        if name not in registered:
            raise self.unknown(name, family)
        return family.build(registered[name], options)

    def _all(self, family: Family) -> Registered:
        own = [Plugin(import_module(name), builtin(), name) for name in self._builtins[family]]
        for plugin in own:
            self._register(plugin)
        self.plugins = [*own, *(plugin for plugin in self.plugins if plugin not in own)]
        return self._registered(own)[family] | self._brought[family]

    def _own_names(self, family: Family) -> set[str]:
        """Of qconvert's own parts: each has that of its module."""
        return {name.rpartition(".")[2].replace("_", "-") for name in self._builtins[family]}

    @cached_property
    def _brought(self) -> dict[Family, Registered]:
        """What third parties bring. The names of built-ins are theirs: a plugin that takes one is set aside."""
        return self._registered([plugin for plugin in self.plugins if plugin.distribution != builtin()])

    def _registered(self, plugins: Sequence[Plugin]) -> dict[Family, Registered]:
        registered: dict[Family, Registered] = {family: {} for family in FAMILIES}
        for plugin in plugins:
            try:
                brought = {family: self._classes(plugin, family) for family in FAMILIES}
            except FAILURES as error:
                self._set_aside(broken(plugin.distribution, plugin.value, error, plugin.implementation))
                self.plugins.remove(plugin)
                continue
            for family, kinds in brought.items():
                for kind in kinds:
                    registered[family].setdefault(kind.name, []).append((kind, plugin))
        return registered

    def _classes(self, plugin: Plugin, family: Family) -> list[type[Any]]:
        """What a plugin brings of a family. Raises what the plugin raises, TypeError and ValueError."""
        kinds = [kind for result in self._ask(plugin, family.hook) for kind in family.classes(result)]
        if plugin.distribution != builtin():
            family.refuse_taken(kinds, self._own_names(family))
        return kinds

    def _first(self, hook: str, source: str, problems: Callable[[object], Iterator[str]]) -> tuple[Plugin | None, Any]:
        """The first plugin that knows `source` and what it returns, held to its contract; None twice if none does."""
        for plugin in reversed(self.plugins):
            try:
                found = self._ask(plugin, hook, source=source)
            except QConvertError:
                raise
            except FAILURES as error:
                raise PluginError(
                    "QC-PLUGIN-006",
                    f"plugin {plugin.distribution} failed to load {source!r}: {reason(error)}",
                    hint="report it to the plugin's author, or uninstall the plugin",
                ) from error
            if found is None:
                continue
            for problem in problems(found):
                raise PluginError(
                    "QC-PLUGIN-006",
                    f"plugin {plugin.distribution} broke its contract at {source!r}: {problem}",
                    hint="report it to the plugin's author, or uninstall the plugin",
                )
            return plugin, found
        return None, None

    def _ask(self, plugin: Plugin, hook: str, **arguments: object) -> Any:
        """Call one hook of one plugin only, so that what it raises has a name."""
        if hook not in hook_functions(plugin.implementation):
            return None if getattr(hookspecs, hook).qconvert_spec["firstresult"] else []
        others = [other.implementation for other in self.plugins if other is not plugin]
        with calls.calling(plugin.distribution, f"{hook} {plugin.value}"):
            return self._hooks.subset_hook_caller(hook, others)(**arguments)

    def _register(self, plugin: Plugin) -> None:
        """Register all hooks of a plugin or none. Raises what pluggy does (wrong arguments), and what `check_hooks` does."""
        implementation = plugin.implementation
        check_hooks(implementation)
        try:
            self._hooks.register(implementation, f"{plugin.distribution.name}:{plugin.value}")
        except FAILURES:
            if self._hooks.is_registered(implementation):
                self._hooks.unregister(implementation)
            raise
        self.plugins.append(plugin)

    def _set_aside(self, found: BrokenPlugin) -> None:
        self.broken.append(found)
        logger.warning("plugin %s is left out", found)

    def unknown(self, name: str, family: Family = QUANTIZERS) -> QConvertError:
        """What to tell a user who asks for a name that nobody brings: QC-PLUGIN-001 or QC-PLUGIN-002."""
        known = sorted({*self._own_names(family), *self._brought[family]})
        return family.unknown(name, known, self.broken)


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and time of every file by name, which tell whether a folder was written to."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path.relative_to(folder).as_posix(): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}
