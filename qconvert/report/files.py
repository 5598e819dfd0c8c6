"""report.json and the model card of an output folder."""

from __future__ import annotations

import json
from pathlib import Path

from qconvert.ir.artifact import CARD, REPORT
from qconvert.ir.report import Report
from qconvert.output import disk_errors
from qconvert.recipe import Recipe
from qconvert.report.card import card


def write_report(report: Report, recipe: Recipe, model_name: str, folder: Path) -> None:
    """Raises ResourceError QC-DISK-002 on a full disk."""
    with disk_errors(folder):
        (folder / REPORT).write_text(json.dumps(report.document(), indent=2) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card(report, recipe, model_name), encoding="utf-8")
