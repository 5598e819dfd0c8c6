"""A Report on the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qconvert.errors import printable
from qconvert.ir.report import Fidelity, Latency, LayerReport, Parity, Report
from qconvert.report import wording
from qconvert.vocabulary import CAST

STYLES = {"passed": "green", "failed": "bold red", "not-run": "yellow", "measured": ""}


def table(report: Report) -> RenderableType:
    """Return a table of the verdict, then its evidence, one section per row."""
    headline = Text.assemble(
        (wording.verdict(report), verdict_style(report)),
        f" - {printable(report.quantizer)}, {wording.title(report)}, {report.task}",
    )
    sections = Table.grid(padding=(0, 2))
    sections.add_column(style="bold", no_wrap=True)
    sections.add_column(ratio=1, overflow="fold")
    for title, content in _sections(report):
        sections.add_row(title, content)
    return Group(headline, sections)


def verdict_style(report: Report) -> str:
    """Return the style of a verdict: green is for what has lost no more than somebody said it may."""
    if report.passed:
        return STYLES["passed"] if report.loss_is_limited else "bold"
    return STYLES["not-run" if report.passed is None else "failed"]


def _sections(report: Report) -> Iterable[tuple[str, RenderableType]]:
    """(title, content) of every section; what a report has nothing to say of is left out."""
    sections = {
        "size": Text(wording.size(report)),
        "parity": _checks((part, wording.parity(part)) for part in report.parity),
        "fidelity": _checks((part, wording.fidelity(part)) for part in report.fidelity),
        "latency": _checks((part, wording.latency(part)) for part in report.latency),
        "measured on": _text(printable(wording.processor(report.processor)) if report.processor else None),
        "gates": _lines(Text(wording.gate(gate), "" if gate.passed else "bold red") for gate in report.gates),
        "samples": Text(f"{report.samples.calibration} for calibration, {report.samples.evaluation} for evaluation"),
        "layers": Text(_quantized(report)),
        "others": _lines(
            Text(f"{len(names)} in {printable(scheme)}: {wording.some(names)}")
            for scheme, names in wording.other_schemes(report.layers)
        ),
        "too small": _lines(Text(line) for line in wording.zeroed(report.layers)),
        "budget": _text(wording.assignment(report.assignment, report.fidelity) if report.assignment else None),
        "outliers": _text(wording.outliers(report.layers)),
        "activations": _text(wording.activations(report.activations) if report.activations else None),
        "cache": _text(wording.kv_cache(report.kv_cache) if report.kv_cache else None),
        "worst": _worst(wording.worst(report.layers)) if report.layers else None,
        "float": _lines(
            Text(f"{len(names)} kept, {printable(reason)}: {wording.some(names)}")
            for reason, names in wording.reasons(report.kept_float)
        ),
    }
    return ((title, content) for title, content in sections.items() if content is not None)


def _quantized(report: Report) -> str:
    if report.quantizer == CAST:
        return f"none quantized, {len(report.layers)} tensors cast to {report.scheme}"
    return f"{len(report.layers)} quantized: {wording.schemes(report.layers)}" if report.layers else "none quantized"


def _text(words: str | None) -> Text | None:
    return Text(words) if words else None


def _lines(lines: Iterable[Text]) -> Text | None:
    """One text of them all, None where there are none."""
    found = list(lines)
    return Text("\n").join(found) if found else None


def _checks(parts: Iterable[tuple[Parity | Fidelity | Latency, str]]) -> Table | None:
    """A row for each check, None where there are none."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1, overflow="fold")
    for part, words in parts:
        status = wording.status(part)
        grid.add_row(part.target, Text(status, STYLES[status]), Text(words))
    return grid if grid.row_count else None


def _worst(layers: list[LayerReport]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold")
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    for layer in layers:
        grid.add_row(Text(printable(layer.name)), layer.scheme, f"relative error {layer.relative_error:.3g}")
    return grid
