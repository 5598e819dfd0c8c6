"""The only place where errors become exit codes, and reports become verdicts."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from qconvert.cli.stdout import emit
from qconvert.errors import told

if TYPE_CHECKING:
    from qconvert.ir.comparison import Comparison
    from qconvert.ir.report import Report

GATE_MISSED = 1
INTERNAL = 70
INTERRUPTED = 130


def verdict(report: Report) -> int:
    """Return 0 for an artifact that passed or was not verified (which the user asked for), 1 for a missed gate.

    Failed parity is an error.
    """
    return GATE_MISSED if report.passed is False else 0


def worst(comparison: Comparison) -> int:
    """Return the highest exit code that one of the recipes would have had by itself."""
    return max(
        entry.error.exit_code if entry.error else verdict(entry.report) if entry.report else 0 for entry in comparison.entries
    )


@contextmanager
def exit_codes(*, as_json: bool) -> Iterator[None]:
    """Exit with the code of what is raised within the context; its text goes to stderr, and as one JSON document to stdout."""
    try:
        yield
    except click.UsageError as error:
        if as_json:  # click prints the usage to stderr and exits with 2
            emit(_document("QC-USAGE-001", error.format_message(), _help_hint(error)))
        raise
    except (KeyboardInterrupt, click.Abort):
        _fail("QC-INTERRUPT-001", "interrupted", "run the same command again to resume", INTERRUPTED, as_json)
    except (click.exceptions.Exit, SystemExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        found = told(error)
        _fail(found.code, found.message, found.hint, found.exit_code, as_json)


def _fail(code: str, message: str, hint: str, exit_code: int, as_json: bool) -> None:
    if os.environ.get("QCONVERT_DEBUG"):
        traceback.print_exc()
    click.echo(f"error [{code}] {message}\n  next: {hint}", err=True)
    if as_json:
        emit(_document(code, message, hint))
    sys.exit(exit_code)


def _document(code: str, message: str, hint: str) -> str:
    return json.dumps({"error": {"code": code, "message": message, "hint": hint}}, indent=2)


def _help_hint(error: click.UsageError) -> str:
    return f"see {error.ctx.command_path} --help" if error.ctx else "see qconvert --help"
