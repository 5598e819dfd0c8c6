"""report.json and the model card of an output folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from qconvert.errors import ResourceError
from qconvert.ir.artifact import CARD, REPORT
from qconvert.ir.report import Report
from qconvert.recipe import Recipe
from qconvert.report.card import card
from qconvert.storage.disk import replace_file
from qconvert.storage.json_text import format_json

logger = logging.getLogger("qconvert")


def write_report(report: Report, recipe: Recipe, model_name: str, folder: Path) -> None:
    """Write report.json and the card.

    Raises ResourceError QC-DISK-002 on a full disk, QC-DISK-003 where the folder can't be written.
    """
    replace_file(folder / REPORT, format_json(report.document()).encode())
    replace_file(folder / CARD, card(report, recipe, model_name).encode())


def complete_report(report: Report, recipe: Recipe, model_name: str, folder: Path) -> None:
    """Write both again where the folder's own report tells of fewer checks, and of none but those that were made now.

    A folder that can't be written keeps what it has, with a warning.
    """
    checked = {part.target for part in report.parity if part.status != "not-run"}
    if not checked > _checked(folder / REPORT):
        return
    try:
        write_report(report, recipe, model_name, folder)
    except ResourceError as error:
        logger.warning("%s and %s do not say what was found now: %s", REPORT, CARD, error.message)


def _checked(path: Path) -> set[str]:
    """The targets that a report.json, of whatever version, has the parity of; one that can't be read tells of none."""
    try:
        parity = json.loads(path.read_text(encoding="utf-8"))["parity"]
        return {part["target"] for part in parity if part["status"] != "not-run"}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
