"""Families: what plugins bring as classes under names, and how one of them is made by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qconvert.errors import PluginError, QConvertError, UsageError
from qconvert.plugin.host import calls
from qconvert.plugin.host.discovery import FAILURES, BrokenPlugin, Plugin, reason
from qconvert.vocabulary import AUTO, CAST, TRAINED

# Name -> the classes that plugins registered under it. More than one is an error only for the user who asks for that name.
Registered = dict[str, list[tuple[type[Any], Plugin]]]


@dataclass(frozen=True, slots=True)
class Family:
    """Parts of one contract.

    word: what messages call one of them.
    hook: the hook that brings them.
    contract: name of the class that they derive from.
    check: raises TypeError for what is no usable class of the family.
    reserved: names that stand for something else.
    builtins: modules of qconvert's own parts, but for quantizers, which the manager is told of.
    """

    word: str
    hook: str
    contract: str
    check: Callable[[object], None]
    reserved: frozenset[str] = frozenset()
    builtins: tuple[str, ...] = ()

    def classes(self, result: object) -> Iterator[type[Any]]:
        """The classes that the hook returned. Raises TypeError for what isn't usable."""
        if not isinstance(result, list | tuple):
            raise TypeError(f"{self.hook} returned {type(result).__name__}, not a list of {self.contract} classes")
        for kind in result:
            self.check(kind)
            yield kind

    def refuse_taken(self, kinds: Sequence[type[Any]], own: set[str]) -> None:
        """Raises ValueError for a name that third parties can't have."""
        for kind in kinds:
            if kind.name in own | self.reserved:
                raise ValueError(f"its {self.word} '{kind.name}' has a name of qconvert's own; give it another")

    def build(self, found: Sequence[tuple[type[Any], Plugin]], options: Mapping[str, object]) -> Any:
        """The one part that was registered under a name, its options validated against the dataclass fields.

        Raises PluginError QC-PLUGIN-003 if there are two, QC-PLUGIN-005 if it can't be built; UsageError QC-PLUGIN-004 for
        wrong options.
        """
        (kind, plugin), *others = found
        if others:
            owners = " and ".join(f"{plugin.distribution} ({plugin.value})" for _, plugin in found)
            raise PluginError(
                "QC-PLUGIN-003",
                f"two plugins bring a {self.word} '{kind.name}': {owners}",
                hint=f"uninstall one of them, or rename its {self.word}",
            )
        return self._build(kind, plugin, options)

    def _build(self, kind: type[Any], plugin: Plugin, options: Mapping[str, object]) -> Any:
        from pydantic import TypeAdapter, ValidationError

        fields = [field for field in dataclasses.fields(kind) if field.init]
        signature = ", ".join(f"{field.name} ({_type_name(field.type)})" for field in fields) or "none"
        hint = f"options of {kind.name} are: {signature}"
        unknown = sorted(set(options) - {field.name for field in fields})
        if unknown:
            raise UsageError(
                "QC-PLUGIN-004", f"{self.word} '{kind.name}' has no option {', '.join(map(repr, unknown))}", hint=hint
            )
        try:
            with calls.calling(plugin.distribution, f"set up '{kind.name}'"):
                return TypeAdapter(kind).validate_python(dict(options))
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or kind.name}: {item['msg']}, got {item['input']!r}"
                for item in error.errors()
            )
            raise UsageError("QC-PLUGIN-004", f"options of {self.word} '{kind.name}': {problems}", hint=hint) from error
        except QConvertError:
            raise
        except FAILURES as error:
            raise PluginError(
                "QC-PLUGIN-005",
                f"{self.word} '{kind.name}' of {plugin.distribution} could not be set up: {reason(error)}",
                hint="report it to the plugin's author",
            ) from error

    def unknown(self, name: str, known: Sequence[str], broken: Sequence[BrokenPlugin]) -> QConvertError:
        """What to tell a user who asks for a name that is not there: QC-PLUGIN-001 or QC-PLUGIN-002."""
        close = difflib.get_close_matches(name, known, n=1)
        listing = f"known are {', '.join(known)}"
        if broken:
            return PluginError(
                "QC-PLUGIN-001",
                f"no {self.word} {name!r}; a plugin that may bring it is broken: {'; '.join(map(str, broken))}",
                hint=f"repair or uninstall that plugin; {listing}",
            )
        return UsageError(
            "QC-PLUGIN-002",
            f"no {self.word} {name!r}",
            hint=f"did you mean '{close[0]}'? {listing}"
            if close
            else f"install the plugin that brings it, or choose another: {listing}",
        )


def _check_quantizer(kind: object) -> None:
    from qconvert.ir.scheme import QuantScheme
    from qconvert.plugin.quantizer import Quantizer

    _check_class(kind, Quantizer, "register_quantizers")
    if not isinstance(getattr(kind, "name", None), str) or not isinstance(getattr(kind, "default_scheme", None), QuantScheme):
        raise TypeError(f"{kind.__name__} lacks a name (str) or a default_scheme (QuantScheme)")  # type: ignore[attr-defined]


def _check_tuner(kind: object) -> None:
    from qconvert.plugin.tuner import BlockTuner

    _check_named(kind, BlockTuner, "register_tuners")


def _check_range_estimator(kind: object) -> None:
    from qconvert.plugin.range_estimator import RangeEstimator

    _check_named(kind, RangeEstimator, "register_range_estimators")


def _check_named(kind: object, contract: type[Any], hook: str) -> None:
    _check_class(kind, contract, hook)
    if not isinstance(getattr(kind, "name", None), str):
        raise TypeError(f"{kind.__name__} lacks a name (str)")  # type: ignore[attr-defined]


def _check_class(kind: object, contract: type[Any], hook: str) -> None:
    if not (isinstance(kind, type) and issubclass(kind, contract)):
        raise TypeError(f"{hook} returned {kind!r}, which is no {contract.__name__} class")
    if not (dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise TypeError(f"{kind.__name__} is no frozen dataclass")


def _type_name(annotation: object) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


QUANTIZERS = Family("quantizer", "register_quantizers", "Quantizer", _check_quantizer, frozenset({AUTO, CAST, TRAINED}))
TUNERS = Family("tuner", "register_tuners", "BlockTuner", _check_tuner, builtins=("qconvert.tuners.signround",))
RANGE_ESTIMATORS = Family(
    "range estimator",
    "register_range_estimators",
    "RangeEstimator",
    _check_range_estimator,
    builtins=(
        "qconvert.range_estimators.min_max",
        "qconvert.range_estimators.moving_average",
        "qconvert.range_estimators.percentile",
        "qconvert.range_estimators.mse",
        "qconvert.range_estimators.kl",
    ),
)
FAMILIES = (QUANTIZERS, TUNERS, RANGE_ESTIMATORS)
