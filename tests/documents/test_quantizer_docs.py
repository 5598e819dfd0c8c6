"""docs/quantizers.md has every built-in quantizer, with its default scheme and its options."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path

import pytest

from qconvert.plugin.host.families import RANGE_ESTIMATORS
from qconvert.plugin.host.manager import BUILTINS
from qconvert.plugin.quantizer import Quantizer
from qconvert.vocabulary import PRESETS, RANGES

TEXT = (Path(__file__).parents[2] / "docs" / "quantizers.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in TEXT.split("\n## ")[1:]}
QUANTIZERS: list[type[Quantizer]] = [kind for name in BUILTINS for kind in import_module(name).register_quantizers()]


@pytest.mark.parametrize("kind", QUANTIZERS, ids=lambda kind: kind.name)
def test_a_quantizer_has_a_section_with_its_source_scheme_and_options(kind: type[Quantizer]) -> None:
    section = SECTIONS[kind.name]
    assert "Source: " in section
    assert f"Default scheme {kind.default_scheme}" in " ".join(section.split())
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ")][1:]
    expected = [(field.name, str(field.default)) for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    assert [(name.strip(), default.strip()) for name, default in rows] == expected


def test_every_range_estimator_has_its_row_and_its_options() -> None:
    kinds = [kind for name in RANGE_ESTIMATORS.builtins for kind in import_module(name).register_range_estimators()]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in SECTIONS["Ranges of activations"].splitlines()]
    named = [row[0] for row in rows if len(row) == 3 and row[0] not in ("estimator", "---")]
    assert [name.removesuffix(" (the default)") for name in named] == [kind.name for kind in kinds]
    assert f"{RANGES} (the default)" in named
    options = [tuple(row[:3]) for row in rows if len(row) == 4 and row[0] not in ("option", "---")]
    assert options == [(field.name, kind.name, str(field.default)) for kind in kinds for field in dataclasses.fields(kind)]


def test_every_preset_is_what_the_document_says() -> None:
    rows = [line for line in SECTIONS["Which one"].splitlines() if "--preset" in line and line.startswith("|")]
    assert len(rows) == len(PRESETS)
    for (name, preset), row in zip(PRESETS.items(), rows, strict=True):
        assert f"`--preset {name}`" in row
        assert f"{preset['quantizer']}, {preset['scheme']}" in row
        assert ("sequential" in row, "tuned" in row) == ("sequential" in preset, "tuning" in preset)
