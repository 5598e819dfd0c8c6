"""`qconvert plan`: what run would do."""

from __future__ import annotations

import json
from typing import Any

import click

from qconvert.cli.recipe_flags import recipe_flags, recipe_of
from qconvert.cli.stdout import emit
from qconvert.ir.garbage import importing

PIPE_WIDTH = 200  # columns for grep, sed and files, where folded names would be in the way


@click.command()
@recipe_flags
def plan(as_json: bool, **flags: Any) -> None:
    """Say what run would do, without doing it.

    From the headers and one block: scheme and bytes of every layer, what stays in float and why.

    stdout: the plan, with --json as a document. Takes the flags of run.
    """
    from rich.console import Console

    from qconvert.cli.terminal import StderrConsole, working
    from qconvert.report.plan import document, table

    with working(StderrConsole()):
        recipe = recipe_of(flags)
        with importing():
            from qconvert import pipeline

        made = pipeline.plan(recipe)
    if as_json:
        emit(json.dumps(document(made), indent=2))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    with console.capture() as capture:  # so that `| head` is met in one place, emit
        console.print(table(made))
    emit(capture.get().rstrip("\n"))
