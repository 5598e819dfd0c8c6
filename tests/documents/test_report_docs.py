"""docs/report.md names every field of report.json, in the section that is about it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from qconvert.ir import report
from qconvert.ir.activation_ranges import ActivationRange, ActivationRanges
from qconvert.ir.decision import Assignment, KeptFloat
from qconvert.ir.histogram import MOST_BINS, MOST_HISTOGRAMS, Histogram, WeightHistogram
from qconvert.quantize.measured import COUNTED

PAGE = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
# Which rows of the first table, or which section, name the fields of a part.
ROWS = {
    "samples": report.SampleCounts,
    "size": report.Size,
    "processor": report.Processor,
    "parity": report.Parity,
    "fidelity": report.Fidelity,
    "gates": report.GateResult,
    "kept_float": KeptFloat,
    "assignment": Assignment,
}
SECTIONS: dict[str, tuple[type[Any], ...]] = {
    "Latency": (report.Latency, report.Trial),
    "Layers": (report.LayerReport, WeightHistogram),
    "Activations": (ActivationRanges, ActivationRange, Histogram),
}


def fields(part: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(part)} if dataclasses.is_dataclass(part) else set(part.model_fields)


def named(text: str) -> set[str]:
    return {word for span in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\w+", span)}


def row(name: str) -> str:
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
    return line


def test_every_section_has_a_row() -> None:
    table = PAGE.partition("| section |")[2].partition("\n## ")[0]
    assert {"schema", *report.Report.model_fields} <= named(table)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_names_the_fields_of_its_part(name: str) -> None:
    assert fields(ROWS[name]) - {"target"} <= named(row(name))  # targets: "per target"


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_names_the_fields_of_its_parts(name: str) -> None:
    section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    for part in SECTIONS[name]:
        assert fields(part) <= named(section), part


def test_the_bounds_are_those_of_the_code() -> None:
    assert f"at most {MOST_BINS} bins. At most {MOST_HISTOGRAMS} layers" in PAGE
    assert f"more than {COUNTED} weights every" in PAGE
