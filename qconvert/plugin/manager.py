"""Finds plugins, asks them, and says which one failed.

Built-ins register through the hooks that third parties use, from an explicit tuple of module names. Third parties
come from the entry-point group "qconvert", in a loop of our own: pluggy's stops at the first plugin that fails to
import and doesn't say whose it is. Every hook is called plugin by plugin, for the same reason.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from qconvert.errors import PluginError, QConvertError, UsageError
from qconvert.plugin import hookspecs
from qconvert.plugin.distribution import GROUP, Distribution, builtin, distribution_of

if TYPE_CHECKING:
    from qconvert.ir.model import Model
    from qconvert.ir.report import Report
    from qconvert.plugin.quantizer import Quantizer
    from qconvert.recipe import Recipe

logger = logging.getLogger(__name__)

BUILTINS = (
    "qconvert.quantizers.absmax",
    "qconvert.quantizers.zero_point",
    "qconvert.quantizers.per_channel",
    "qconvert.quantizers.hqq",
    "qconvert.quantizers.awq",
    "qconvert.quantizers.gptq",
    "qconvert.quantizers.llm_int8",
    "qconvert.quantizers.smoothquant",
)

# What a foreign plugin may raise and must not stop us with; sys.exit() at import time is one of the things that happen.
FAILURES = (Exception, SystemExit)


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """A plugin that could not be used.

    value: the entry point, "qconvert_kmeans:plugin".
    reason: one line, "ImportError: No module named 'x'".
    traceback: its last lines.
    """

    distribution: Distribution
    value: str
    reason: str
    traceback: str

    def __str__(self) -> str:
        return f"{self.distribution} ({self.value}): {self.reason}"


@dataclass(frozen=True, slots=True)
class _Plugin:
    implementation: Any  # a module, or any object with hook implementations
    distribution: Distribution
    value: str


def plugin_manager() -> PluginManager:
    """All plugins of this environment."""
    return PluginManager(BUILTINS)


class PluginManager:
    """The plugins of one run.

    broken: plugins that could not be used, each logged once as a warning; the rest works.
    """

    def __init__(self, builtins: Sequence[str]) -> None:
        self.broken: list[BrokenPlugin] = []
        self._plugins: list[_Plugin] = []
        self._hooks = pluggy.PluginManager("qconvert")
        self._hooks.add_hookspecs(hookspecs)
        for name in builtins:
            self._register(_Plugin(import_module(name), builtin(), name))
        for entry_point in sorted(entry_points(group=GROUP), key=lambda each: (each.name, each.value)):
            self._load(entry_point)

    def quantizer(self, name: str, options: Mapping[str, object]) -> Quantizer:
        """The quantizer that registered as `name`, with the user's options.

        Raises UsageError QC-PLUGIN-002 if none did, QC-PLUGIN-004 for wrong options; PluginError QC-PLUGIN-001 if none
        did but a broken plugin may have been meant to, QC-PLUGIN-003 if two did, QC-PLUGIN-005 if it can't be built.
        """
        found = self._quantizers.get(name, [])
        if not found:
            raise self._unknown(name)
        if len(found) > 1:
            owners = " and ".join(f"{plugin.distribution} ({plugin.value})" for _, plugin in found)
            raise PluginError(
                "QC-PLUGIN-003",
                f"two plugins bring a quantizer '{name}': {owners}",
                hint="uninstall one of them, or rename its quantizer",
            )
        kind, plugin = found[0]
        return _build(kind, plugin, options)

    def load_model(self, source: str) -> Model | None:
        """What the first plugin that knows `source` makes of it, None if none does.

        Raises PluginError QC-PLUGIN-006 if a plugin raises or returns no Model; its own QConvertErrors pass.
        """
        from qconvert.ir.model import Model

        for plugin in reversed(self._plugins):
            try:
                model = self._ask(plugin, "load_model", source=source)
            except QConvertError:
                raise
            except FAILURES as error:
                raise PluginError(
                    "QC-PLUGIN-006",
                    f"plugin {plugin.distribution} failed to load {source!r}: {_reason(error)}",
                    hint="report it to the plugin's author, or uninstall the plugin",
                ) from error
            if isinstance(model, Model):
                return model
            if model is not None:
                raise PluginError(
                    "QC-PLUGIN-006",
                    f"plugin {plugin.distribution} returned {type(model).__name__} for {source!r}, not a Model",
                    hint="report it to the plugin's author, or uninstall the plugin",
                )
        return None

    def conversion_finished(self, recipe: Recipe, report: Report) -> None:
        """Tell every plugin. One that fails is a warning: the output is published and stays."""
        for plugin in reversed(self._plugins):
            try:
                self._ask(plugin, "conversion_finished", recipe=recipe, report=report)
            except FAILURES as error:
                logger.warning("plugin %s failed after the conversion: %s", plugin.distribution, _reason(error))

    def distribution_of(self, quantizer: Quantizer) -> Distribution:
        """Name and version of the distribution that a quantizer came from, for the manifest."""
        return distribution_of(quantizer)

    @cached_property
    def _quantizers(self) -> dict[str, list[tuple[type[Quantizer], _Plugin]]]:
        """name -> who registered it. More than one is an error only for the user who asks for that name."""
        registered: dict[str, list[tuple[type[Quantizer], _Plugin]]] = {}
        for plugin in self._plugins:
            try:
                kinds = [kind for result in self._ask(plugin, "register_quantizers") for kind in _quantizer_types(result)]
            except FAILURES as error:
                self._set_aside(plugin.distribution, plugin.value, error)
                continue
            for kind in kinds:
                registered.setdefault(kind.name, []).append((kind, plugin))
        return registered

    def _ask(self, plugin: _Plugin, hook: str, **arguments: object) -> Any:
        """Call one hook of one plugin only, so that what it raises has a name."""
        others = [other.implementation for other in self._plugins if other is not plugin]
        return self._hooks.subset_hook_caller(hook, others)(**arguments)

    def _load(self, entry_point: EntryPoint) -> None:
        dist = entry_point.dist
        distribution = Distribution(dist.name, dist.version) if dist else Distribution(entry_point.name, "(no version)")
        try:
            self._register(_Plugin(entry_point.load(), distribution, entry_point.value))
        except FAILURES as error:
            self._set_aside(distribution, entry_point.value, error)

    def _register(self, plugin: _Plugin) -> None:
        """Register all hooks of a plugin or none. Raises what pluggy does: wrong arguments, unknown hooks."""
        implementation = plugin.implementation
        try:
            self._hooks.register(implementation, f"{plugin.distribution.name}:{plugin.value}")
            self._hooks.check_pending()  # a misspelt hook name would otherwise never be called, in silence
            if not self._hooks.get_hookcallers(implementation):
                raise LookupError("it implements no hook: decorate its functions with @qconvert.hookimpl")
        except FAILURES:
            if self._hooks.is_registered(implementation):
                self._hooks.unregister(implementation)
            raise
        self._plugins.append(plugin)

    def _set_aside(self, distribution: Distribution, value: str, error: BaseException) -> None:
        tail = "".join(traceback.format_exception(error, limit=-3))
        broken = BrokenPlugin(distribution, value, _reason(error), tail)
        self.broken.append(broken)
        logger.warning("plugin %s is left out", broken)

    def _unknown(self, name: str) -> QConvertError:
        known = sorted(self._quantizers)
        close = difflib.get_close_matches(name, known, n=1)
        listing = f"known are {', '.join(known)}"
        if self.broken:
            return PluginError(
                "QC-PLUGIN-001",
                f"no quantizer {name!r}; a plugin that may bring it is broken: {'; '.join(map(str, self.broken))}",
                hint=f"repair or uninstall that plugin; {listing}",
            )
        return UsageError(
            "QC-PLUGIN-002",
            f"no quantizer {name!r}",
            hint=f"did you mean '{close[0]}'? {listing}"
            if close
            else f"install the plugin that brings it, or choose another: {listing}",
        )


def _quantizer_types(result: object) -> Iterator[type[Quantizer]]:
    """The classes that a `register_quantizers` returned. Raises TypeError for what isn't a usable Quantizer class."""
    from qconvert.ir.scheme import QuantScheme
    from qconvert.plugin.quantizer import Quantizer

    if not isinstance(result, list | tuple):
        raise TypeError(f"register_quantizers returned {type(result).__name__}, not a list of Quantizer classes")
    for kind in result:
        if not (isinstance(kind, type) and issubclass(kind, Quantizer)):
            raise TypeError(f"register_quantizers returned {kind!r}, which is no Quantizer class")
        if not (dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen):
            raise TypeError(f"{kind.__name__} is no frozen dataclass")
        if not isinstance(getattr(kind, "name", None), str) or not isinstance(
            getattr(kind, "default_scheme", None), QuantScheme
        ):
            raise TypeError(f"{kind.__name__} lacks a name (str) or a default_scheme (QuantScheme)")
        yield kind


def _build(kind: type[Quantizer], plugin: _Plugin, options: Mapping[str, object]) -> Quantizer:
    """The quantizer with its options validated against the dataclass fields."""
    from pydantic import TypeAdapter, ValidationError

    fields = [field for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
    signature = ", ".join(f"{field.name} ({_type_name(field.type)})" for field in fields) or "none"
    hint = f"options of {kind.name} are: {signature}"
    unknown = sorted(set(options) - {field.name for field in fields})
    if unknown:
        raise UsageError("QC-PLUGIN-004", f"quantizer '{kind.name}' has no option {', '.join(map(repr, unknown))}", hint=hint)
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or kind.name}: {item['msg']}, got {item['input']!r}" for item in error.errors()
        )
        raise UsageError("QC-PLUGIN-004", f"options of quantizer '{kind.name}': {problems}", hint=hint) from error
    except QConvertError:
        raise
    except FAILURES as error:
        raise PluginError(
            "QC-PLUGIN-005",
            f"quantizer '{kind.name}' of {plugin.distribution} could not be set up: {_reason(error)}",
            hint="report it to the plugin's author",
        ) from error


def _type_name(annotation: object) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
