"""The catalogue of plugins on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qconvert.plugin.host.catalogue import Entry
from qconvert.plugin.host.discovery import BrokenPlugin

TITLES = ("name", "kind", "distribution", "version", "API", "data", "schemes")


def table(entries: Sequence[Entry], broken: Sequence[BrokenPlugin]) -> RenderableType:
    """One row per quantizer, tuner, range estimator, loader, finder of data and finisher; below, what is broken and why."""
    rows = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for title in TITLES:
        rows.add_column(title, overflow="fold", no_wrap=title != "schemes")
    for entry in entries:
        data = "" if entry.calibrated is None else "yes" if entry.calibrated else "no"
        cells = (entry.name, entry.kind, entry.distribution, entry.version, str(entry.api), data, " ".join(entry.schemes))
        rows.add_row(*map(Text, cells))
    return Group(rows, *(Text.assemble(("broken: ", "bold red"), str(each)) for each in broken))


def page(entry: Entry) -> RenderableType:
    """Return a page with all that is known of one of them."""
    lines = [Text(entry.name, "bold"), Text(entry.doc)] if entry.doc else [Text(entry.name, "bold")]
    facts = [f"{entry.kind} of {entry.distribution} {entry.version} ({entry.value}), plugin API {entry.api}"]
    if entry.default_scheme is not None:
        facts.append(f"needs calibration data: {'yes' if entry.calibrated else 'no'}")
        facts.append(f"default scheme {entry.default_scheme}; takes {', '.join(entry.schemes)}")
    parts: list[RenderableType] = [*lines, Text(), *map(Text, facts)]
    if entry.options:
        parts += [Text(), _options(entry)]
    elif entry.kind in ("quantizer", "tuner", "range estimator"):
        parts += [Text(), Text("It has no options.")]
    if entry.expected_failures:
        parts += [Text(), Text("Checks of the conformance suite that it is known to fail:", "bold")]
        parts += [Text(f"  {name}: {why}") for name, why in entry.expected_failures.items()]
    if entry.source:
        parts += [Text(), Text(entry.source)]
    return Group(*parts)


def _options(entry: Entry) -> Table:
    rows = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for title in ("option", "kind", "default", "what it does"):
        rows.add_column(title, overflow="fold", no_wrap=title == "option")
    for option in entry.options:
        default = "required" if option.required else "null" if option.default is None else str(option.default)
        rows.add_row(*map(Text, (option.name, option.kind, default, option.doc)))
    return rows
