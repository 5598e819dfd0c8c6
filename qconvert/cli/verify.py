"""`qconvert verify`: runs an artifact again."""

from __future__ import annotations

from pathlib import Path

import click

from qconvert.cli.recipe_flags import TARGETS
from qconvert.supervision.startup import importing


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--target", "targets", type=TARGETS, multiple=True, help="Where to run it; may be repeated. Default: all it was made for."
)
@click.option(
    "--evaluation",
    metavar="SRC",
    help=".txt, .jsonl, .parquet or .npz file, 'builtin', or what a plugin finds. Default: that of its recipe.",
)
@click.option(
    "--gate",
    "gates",
    metavar="'kl<=0.2'",
    multiple=True,
    help="Limit that it must keep; may be repeated. Default: its recipe's.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def verify(folder: Path, targets: tuple[str, ...], evaluation: str | None, gates: tuple[str, ...], as_json: bool) -> None:
    """Run an artifact again.

    Checks the files in OUT against their digests and compares with the float source, which must still be there. What
    report.json and the card do not tell yet, as after --no-verify, is written into them.

    stdout: the folder, or with --json the report.
    """
    from qconvert.cli.report import show
    from qconvert.cli.terminal import StderrConsole, working
    from qconvert.pipeline import preflight
    from qconvert.recipe.gates import Gate

    console = StderrConsole()
    with working(console) as progress:
        parsed = tuple(map(Gate.parse, gates))
        plugins = preflight.check_published(folder, targets, evaluation, parsed)
        with importing():
            from qconvert.pipeline.verification import verify as verify_folder

        report = verify_folder(folder, targets, evaluation, parsed, progress, plugins)
    show(report, folder, console, as_json=as_json)
