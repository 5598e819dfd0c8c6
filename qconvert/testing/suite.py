"""All checks by name, and the ways to run them: in one call, or as parameters of a pytest test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from qconvert.plugin.host.discovery import FAILURES, reason
from qconvert.plugin.options import first_paragraph
from qconvert.plugin.quantizer import Quantizer
from qconvert.testing import declaration, export, observers, purity, quality, record, robustness
from qconvert.testing.failure import CheckFailure

if TYPE_CHECKING:
    import pytest

PREFIX = "check_"
SUBJECTS = (declaration, record, purity, robustness, quality, observers, export)


@dataclass(frozen=True)
class Check:
    """One rule that every quantizer is held to.

    name: kebab-case, "codes-in-range". doc: the rule and why it matters, in a line.
    """

    name: str
    doc: str
    function: Callable[[Quantizer], None]

    def __call__(self, quantizer: Quantizer) -> None:
        """Raises CheckFailure that says what was found where, and the rule; also for what the quantizer itself raises."""
        try:
            self.function(quantizer)
        except FAILURES as error:
            found = str(error) if isinstance(error, CheckFailure) else reason(error)
            raise CheckFailure(f"{quantizer.name}, {self.name}: {found}\n  the rule: {self.doc}") from error

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    status: "expected" is a failure that the quantizer declares, message then holds its reason.
    message: "" where it passed.
    """

    name: str
    status: Literal["passed", "failed", "expected"]
    message: str = ""


def checks() -> tuple[Check, ...]:
    """Return every check, in the order in which a new quantizer is best repaired."""
    return tuple(check for subject in SUBJECTS for check in _checks_of(subject))


def check_quantizer(quantizer: Quantizer, on_result: Callable[[CheckResult], None] | None = None) -> list[CheckResult]:
    """Run all checks; nothing is raised.

    on_result: called with each result as it comes.

    A check in the quantizer's `expected_failed_checks` must fail, or else its result is a failure: reasons do not outlive
    what they explain. So is a name there that no check has.
    """
    results = []
    for result in _results(quantizer):
        results.append(result)
        if on_result is not None:
            on_result(result)
    return results


def parametrize_with_checks(quantizers: Sequence[Quantizer]) -> pytest.MarkDecorator:
    """Decorate `def test_conforms(quantizer, check): check(quantizer)`; ids are like "awq-deterministic".

    Expected failures are marked as such, strictly. Raises ValueError for one that no check is named like. Needs pytest.
    """
    import pytest

    every = checks()
    parameters = []
    for quantizer in quantizers:
        if stale := _unknown(quantizer, every):
            raise ValueError(f"expected_failed_checks of {quantizer.name} names no check: {', '.join(stale)}")
        for check in every:
            reason = quantizer.expected_failed_checks.get(check.name)
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True, raises=CheckFailure)]
            parameters.append(pytest.param(quantizer, check, marks=marks, id=f"{quantizer.name}-{check.name}"))
    return pytest.mark.parametrize(("quantizer", "check"), parameters)


def _checks_of(subject: ModuleType) -> Iterator[Check]:
    """The functions check_* that a module defines, in its order."""
    for name, function in vars(subject).items():
        if name.startswith(PREFIX) and function.__module__ == subject.__name__:
            doc = first_paragraph(function.__doc__)
            yield Check(name.removeprefix(PREFIX).replace("_", "-"), doc, function)


def _results(quantizer: Quantizer) -> Iterator[CheckResult]:
    every = checks()
    for check in every:
        reason = quantizer.expected_failed_checks.get(check.name)
        try:
            check(quantizer)
        except CheckFailure as failure:
            yield (
                CheckResult(check.name, "failed", str(failure))
                if reason is None
                else CheckResult(check.name, "expected", reason)
            )
            continue
        if reason is None:
            yield CheckResult(check.name, "passed")
        else:
            yield CheckResult(check.name, "failed", f"it passes, though it is expected to fail: {reason}")
    for name in _unknown(quantizer, every):
        yield CheckResult(name, "failed", "expected_failed_checks names it, but there is no such check")


def _unknown(quantizer: Quantizer, every: Sequence[Check]) -> list[str]:
    return sorted(set(quantizer.expected_failed_checks) - {check.name for check in every})
