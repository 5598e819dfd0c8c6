"""Checks of what a quantizer says of itself."""

from __future__ import annotations

import dataclasses
import pickle

from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.host.scaffold import NAME
from qconvert.plugin.observer import Observer
from qconvert.plugin.quantizer import Quantizer
from qconvert.testing.failure import CheckFailure
from qconvert.testing.samples import SCHEMES, difference, every_outcome, typical


def check_is_frozen_dataclass(quantizer: Quantizer) -> None:
    """A quantizer is a frozen dataclass: its fields are the options that qconvert validates and records."""
    kind = type(quantizer)
    parameters = getattr(kind, "__dataclass_params__", None)
    if "__dataclass_params__" not in vars(kind) or parameters is None or not parameters.frozen:
        raise CheckFailure(f"{kind.__name__} has no decorator @dataclass(frozen=True) of its own")


def check_options_have_defaults(quantizer: Quantizer) -> None:
    """Every option has a default, so that --quantizer NAME is enough."""
    missing = [
        field.name
        for field in dataclasses.fields(quantizer)  # type: ignore[arg-type]
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise CheckFailure(f"{len(missing)} options have none: {', '.join(missing)}")


def check_name_is_kebab_case(quantizer: Quantizer) -> None:
    """The name is what users type: lower-case words and digits, joined by hyphens."""
    name = getattr(quantizer, "name", None)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise CheckFailure(f"its name is {name!r}")


def check_default_scheme_is_accepted(quantizer: Quantizer) -> None:
    """The default scheme is one that kernels exist for and that the quantizer itself does not refuse."""
    scheme = getattr(quantizer, "default_scheme", None)
    if not isinstance(scheme, QuantScheme):
        raise CheckFailure(f"default_scheme is {scheme!r}, not a QuantScheme")
    if QuantScheme.parse(str(scheme)) != scheme or not scheme.has_kernel:
        raise CheckFailure(f"scheme {scheme} can't be planned")
    reason = quantizer.refuses(scheme)
    if reason is not None:
        raise CheckFailure(f"it refuses its default scheme {scheme}: {reason}")


def check_refusals_have_reasons(quantizer: Quantizer) -> None:
    """`refuses` gives None or half a sentence, the same each time: users read it."""
    for scheme in SCHEMES:
        reason, again = quantizer.refuses(scheme), quantizer.refuses(scheme)
        if reason != again:
            raise CheckFailure(f"scheme {scheme}: it says {reason!r}, then {again!r}")
        if reason is not None and not (isinstance(reason, str) and len(reason.split()) >= 3):
            raise CheckFailure(f"scheme {scheme}: {reason!r} tells nobody why")


def check_observers_are_declared(quantizer: Quantizer) -> None:
    """Observers are a tuple of Observer classes with names of their own: statistics are found by these names."""
    observers = quantizer.observers
    if not isinstance(observers, tuple):
        raise CheckFailure(f"observers is a {type(observers).__name__}, not a tuple")
    for kind in observers:
        if not (isinstance(kind, type) and issubclass(kind, Observer)):
            raise CheckFailure(f"observers holds {kind!r}, which is no Observer class")
        kind()
    names = [kind.name for kind in observers]
    if len(set(names)) < len(names):
        raise CheckFailure(f"observers have names in common: {names}")


def check_expected_failures_have_reasons(quantizer: Quantizer) -> None:
    """expected_failed_checks maps names of checks to reasons: users read them."""
    for name, reason in quantizer.expected_failed_checks.items():
        if not isinstance(reason, str) or len(reason.split()) < 3:
            raise CheckFailure(f"expected_failed_checks[{name!r}] is {reason!r}, which tells nobody why")


def check_survives_pickling(quantizer: Quantizer) -> None:
    """A pickled quantizer is equal to itself and gives the same bytes: work may be handed to other processes."""
    copied = pickle.loads(pickle.dumps(quantizer))
    if copied != quantizer:
        raise CheckFailure(f"it came back as {copied!r}, and was {quantizer!r}")
    for here, there in zip(every_outcome(quantizer, typical()), every_outcome(copied, typical()), strict=True):
        if found := difference(here.tensor, there.tensor):
            raise CheckFailure(f"{here.place}: after pickling, {found}")
