"""`qconvert compare`: several recipes on one model, side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from qconvert.cli.exits import worst
from qconvert.cli.recipe_flags import part_of, settings_of, shared_flags
from qconvert.cli.stdout import emit, emit_table
from qconvert.supervision.startup import importing


@click.command()
@click.argument("recipe_file", metavar="[COMPARE.yaml]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--try", "tries", metavar="QUANTIZER[:SCHEME]", multiple=True, help="A recipe, beside those of the file; may be repeated."
)
@shared_flags
def compare(tries: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Try several recipes on one model, calibrated once.

    COMPARE.yaml is a recipe with a list 'recipes': each has a name, and what differs from the rest. Every artifact is
    written to DIR/NAME, and DIR gets compare.json and compare.png, which plots size against loss.

    \b
    qconvert compare --model M --output DIR --try awq:int4-g32 --try per-channel:int8-channel-a8

    stdout: the table, or with --json the document. The exit code is the highest that any recipe would have had alone.
    """
    from qconvert.cli.terminal import StderrConsole, working
    from qconvert.pipeline import preflight
    from qconvert.recipe.comparison import named_recipes, tried
    from qconvert.report.comparison import table

    console = StderrConsole()
    with working(console) as progress:
        settings = settings_of(flags)
        if tries:
            settings["recipes"] = [*part_of(settings, "recipes", list), *map(tried, tries)]
        recipes = named_recipes(settings)
        plugins = preflight.check_comparison(recipes)
        with importing():
            from qconvert.pipeline.comparison import compare as compare_recipes

        comparison = compare_recipes(recipes, progress, plugins)
    if as_json:
        console.print(table(comparison))
        emit(json.dumps(comparison.document(), indent=2))
    else:
        emit_table(table(comparison))
    sys.exit(worst(comparison))
