"""A Comparison on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qconvert.errors import printable
from qconvert.ir.comparison import Comparison, Entry
from qconvert.report import wording
from qconvert.report.table import STYLES, verdict_style

WORDS = ("recipe", "quantizer, scheme")
TEXTS = ("", *WORDS, "result")


def table(comparison: Comparison) -> RenderableType:
    """Return a table with one row per recipe, a star for those on the Pareto front; then what failed, and what to do next."""
    decoder = comparison.task.generates
    titles = (*TEXTS, "size", "bits", *(("KL", "prefill", "decode") if decoder else ("cosine", "p50 ms")), "seconds")
    rows = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for title in titles:
        folds = title in WORDS  # the rest is what it is about
        rows.add_column(
            title,
            justify="left" if title in TEXTS else "right",
            no_wrap=not folds,
            overflow="fold",
            min_width=8 if folds else None,
        )
    for entry in comparison.entries:
        cells = _cells(entry) | {"": Text("*" if entry.name in comparison.front else "", "bold green")}
        rows.add_row(*(cells.get(title, Text()) for title in titles))
    return Group(rows, Text(), *(Text(line) for line in _notes(comparison, decoder)))


def _notes(comparison: Comparison, decoder: bool) -> Iterator[str]:
    for entry in comparison.entries:
        if entry.error:
            yield f"{entry.name}: [{entry.error.code}] {entry.error.message}\n  next: {entry.error.hint}"
        for gate in entry.report.gates if entry.report else ():
            if not gate.passed:
                yield f"{entry.name}: {wording.gate(gate)}"
    if comparison.front:
        yield "* no other recipe is as small and has as little loss"
    if any(entry.latency is not None and entry.latency.busy for entry in comparison.entries):
        yield "? measured while the machine was busy: not to be compared"
    yield f"{'prefill and decode: tokens/s; ' if decoder else ''}seconds: to quantize and write, without the shared calibration"


def _cells(entry: Entry) -> dict[str, Text]:
    cells = {
        "recipe": Text(entry.name),
        "quantizer, scheme": Text(f"{printable(entry.quantizer)} {entry.scheme}"),
        "result": _result(entry),
    }
    measured: dict[str, str] = {}
    if entry.report is not None:
        size = entry.report.size
        measured |= {"size": wording.byte_size(size.weights_bytes), "bits": f"{size.average_bits:.3g}"}
    if entry.fidelity is not None:
        measured |= {"KL": _number(entry.fidelity.kl, ".3g"), "cosine": _number(entry.fidelity.cosine, ".5f")}
    if entry.latency is not None:
        busy = "?" if entry.latency.busy else ""
        measured["prefill"] = _number(entry.latency.prefill_tokens_per_s, ".0f", busy)
        measured["decode"] = _number(entry.latency.decode_tokens_per_s, ".0f", busy)
        measured["p50 ms"] = _number(entry.latency.p50_ms, ".3g", busy)
    measured["seconds"] = _number(entry.quantize_seconds, ".1f")
    return cells | {title: Text(value) for title, value in measured.items()}


def _result(entry: Entry) -> Text:
    """The error's code, or the verdict in two words."""
    report = entry.report
    if entry.error or report is None:
        return Text(entry.error.code if entry.error else "", STYLES["failed"])
    passed = "passed" if report.gates else "no limits"
    return Text({True: passed, False: "failed", None: "not verified"}[report.passed], verdict_style(report))


def _number(value: float | None, form: str, mark: str = "") -> str:
    return "" if value is None else f"{value:{form}}{mark}"
