"""`qconvert plan`: what run would do."""

from __future__ import annotations

import json
from typing import Any

import click

from qconvert.cli.recipe_flags import recipe_flags, recipe_of
from qconvert.cli.stdout import emit, emit_table
from qconvert.supervision.startup import importing


@click.command()
@recipe_flags
def plan(as_json: bool, **flags: Any) -> None:
    """Say what run would do, without doing it.

    From the headers and one block: scheme and bytes of every layer, what stays in float and why.

    stdout: the plan, with --json as a document. Takes the flags of run.
    """
    from qconvert.cli.terminal import StderrConsole, working
    from qconvert.pipeline import preflight

    with working(StderrConsole()):
        recipe = recipe_of(flags)
        plugins = preflight.check(recipe, writes=False)
        with importing():
            from qconvert.pipeline.preparation import plan as make_plan
            from qconvert.report.plan import document, table

        made = make_plan(recipe, plugins)
    if as_json:
        emit(json.dumps(document(made), indent=2))
    else:
        emit_table(table(made))
