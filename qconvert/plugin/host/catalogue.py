"""The catalogue: what every plugin brings, as `qconvert plugins list` and `show` tell it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qconvert.errors import QConvertError
from qconvert.plugin import hookspecs
from qconvert.plugin.host import contract
from qconvert.plugin.host.discovery import BrokenPlugin, Plugin, hook_functions
from qconvert.plugin.host.families import RANGE_ESTIMATORS, TUNERS, Family, Registered
from qconvert.plugin.host.manager import PluginManager
from qconvert.plugin.options import Option, first_paragraph, options_of, options_schema, summary
from qconvert.recipe import Recipe
from qconvert.vocabulary import TUNER

if TYPE_CHECKING:
    from qconvert.plugin.quantizer import Quantizer

KINDS = {"load_model": "loader", "find_data": "data", "conversion_finished": "finisher"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One quantizer, tuner, range estimator, loader of models, finder of data, or finisher.

    name: of a quantizer, tuner or range estimator, else the plugin's module.
    value: the entry point, the module of a built-in, or the file.
    api: the version of the plugin API that it is written for.
    doc, source: what it says of itself in a line; its module's whole docstring, where the source is cited.
    default_scheme, schemes, calibrated: of a quantizer; schemes names those that it takes, "gN" for any group size.
    options: of a quantizer, tuner or range estimator.
    expected_failures: check of the conformance suite -> why it is known to fail.
    """

    name: str
    kind: str
    distribution: str
    version: str
    value: str
    api: int
    doc: str = ""
    source: str = ""
    default_scheme: str | None = None
    schemes: tuple[str, ...] = ()
    calibrated: bool | None = None
    options: tuple[Option, ...] = ()
    expected_failures: dict[str, str] = dataclasses.field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the entry as JSON."""
        return dataclasses.asdict(self)


def entries(plugins: PluginManager) -> tuple[Entry, ...]:
    """Quantizers, tuners and range estimators by name, then the others. What is broken is in `plugins.broken` afterwards."""
    quantizers = [_quantizer(kind, plugin) for _, found in sorted(plugins.quantizers.items()) for kind, plugin in found]
    parts = [
        _part(family, kind, plugin)
        for family, registered in ((TUNERS, plugins.tuners), (RANGE_ESTIMATORS, plugins.range_estimators))
        for _, found in sorted(registered.items())
        for kind, plugin in found
    ]
    others = [
        Entry(plugin.value, word, *plugin.distribution, plugin.value, _api(plugin), *_docs(plugin.implementation))
        for plugin in plugins.plugins
        for hook, word in KINDS.items()
        if hook in hook_functions(plugin.implementation)
    ]
    return (*quantizers, *parts, *others)


def document(found: Sequence[Entry], broken: Sequence[BrokenPlugin]) -> dict[str, Any]:
    """Return what `qconvert plugins list --json` prints (schema 1)."""
    return {
        "schema": 1,
        "api": hookspecs.API_VERSION,
        "plugins": [entry.document() for entry in found],
        "broken": [_broken_document(each) for each in broken],
    }


def _broken_document(broken: BrokenPlugin) -> dict[str, str]:
    return {
        "distribution": broken.distribution.name,
        "version": broken.distribution.version,
        "value": broken.value,
        "reason": broken.reason,
        "location": broken.location,
    }


def recipe_schema(plugins: PluginManager) -> dict[str, Any]:
    """The JSON schema of a recipe, with the options of every quantizer, plugin's tuner and range estimator that is there."""
    schema = Recipe.model_json_schema()
    schema["allOf"] = _options_by_name("quantizer", plugins.quantizers)
    tuners = {name: found for name, found in plugins.tuners.items() if name != TUNER}
    schema["$defs"]["Tuning"]["allOf"] = _options_by_name("tuner", tuners)
    schema["$defs"]["Ranges"]["allOf"] = _options_by_name("estimator", plugins.range_estimators)
    return schema


def _options_by_name(field: str, registered: Registered) -> list[dict[str, Any]]:
    """What `options` may hold for each name in `field`."""
    return [
        {
            "if": {"properties": {field: {"const": name}}, "required": [field]},
            "then": {"properties": {"options": options_schema(found[0][0])}},
        }
        for name, found in sorted(registered.items())
    ]


def _part(family: Family, kind: type[Any], plugin: Plugin) -> Entry:
    """The entry of a tuner or a range estimator."""
    facts = (*plugin.distribution, plugin.value, _api(plugin), summary(kind), _module_doc(kind))
    return Entry(kind.name, family.word, *facts, options=options_of(kind))


def _module_doc(kind: type[Any]) -> str:
    module = inspect.getmodule(kind)
    return inspect.cleandoc(module.__doc__ or "") if module else ""


def _quantizer(kind: type[Quantizer], plugin: Plugin) -> Entry:
    return Entry(
        kind.name,
        "quantizer",
        *plugin.distribution,
        plugin.value,
        _api(plugin),
        summary(kind),
        _module_doc(kind),
        str(kind.default_scheme),
        tuple(_schemes(kind)),
        bool(kind.observers),
        options_of(kind),
        dict(getattr(kind, "expected_failed_checks", {})),
    )


def _schemes(kind: type[Quantizer]) -> Iterator[str]:
    """Yield the schemes that a quantizer takes with its default options, its default if it can't be made without options."""
    from qconvert.ir.scheme import CODEBOOKS, QuantScheme

    try:
        quantizer = kind()
    except Exception:  # an option without a default, or one that its own check refuses
        yield str(kind.default_scheme)
        return
    integers = (
        f"int{bits}-{granularity}{suffix}"
        for bits in (4, 8)
        for granularity in ("tensor", "channel", "gN")
        for suffix in ("", "-asym", "-a8", "-asym-a8")
    )
    codebooks = (f"{each.name}-gN{suffix}" for each in CODEBOOKS for suffix in ("", "-dq"))
    for text in (*integers, *codebooks):
        scheme = QuantScheme.parse(text.replace("gN", "g32"))
        try:
            if scheme.has_kernel and contract.refuses(quantizer, scheme) is None:
                yield text
        except QConvertError:  # what is wrong with it is for `plugins check` to say
            return


def _docs(implementation: object) -> tuple[str, str]:
    text = inspect.cleandoc(getattr(implementation, "__doc__", None) or "")
    return first_paragraph(text), text


def _api(plugin: Plugin) -> int:
    return int(getattr(plugin.implementation, "QCONVERT_API", hookspecs.API_VERSION))
