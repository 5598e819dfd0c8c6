"""The last words of `run` and `verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from qconvert.cli.exits import verdict
from qconvert.cli.stdout import emit
from qconvert.report.table import table
from qconvert.storage.json_text import format_json

if TYPE_CHECKING:
    from qconvert.ir.report import Report


def show(report: Report, folder: Path, console: Console, *, as_json: bool) -> NoReturn:
    """Print the table on stderr and the folder (or the JSON document) on stdout, and exit with the verdict's code."""
    console.print(table(report))
    emit(format_json(report.document()).rstrip() if as_json else str(folder))
    sys.exit(verdict(report))
