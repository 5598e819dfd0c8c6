"""`qconvert run`: the main job."""

from __future__ import annotations

from typing import Any

import click

from qconvert.cli.recipe_flags import recipe_flags, recipe_of
from qconvert.supervision.startup import importing


@click.command()
@recipe_flags
def run(as_json: bool, **flags: Any) -> None:
    """Quantize, export and verify a checkpoint.

    Writes safetensors and ONNX, runs the result, and reports what was lost and won.

    stdout: the output folder, or with --json the report. The flags override the recipe file.
    """
    from qconvert.cli.report import show
    from qconvert.cli.terminal import StderrConsole, working
    from qconvert.pipeline import preflight

    console = StderrConsole()
    with working(console) as progress:
        recipe = recipe_of(flags)
        plugins = preflight.check(recipe)
        with importing():
            from qconvert.pipeline.conversion import convert

        report = convert(recipe, progress, plugins)
    show(report, recipe.output, console, as_json=as_json)
