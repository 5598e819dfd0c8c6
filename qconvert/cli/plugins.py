"""`qconvert plugins`: what plugins there are, and what they bring."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qconvert.cli.stdout import emit, emit_table
from qconvert.errors import PluginError
from qconvert.supervision.startup import importing

if TYPE_CHECKING:
    from qconvert.testing import CheckResult

FILES = click.option(
    "--plugin", "files", metavar="FILE", multiple=True, type=click.Path(path_type=Path), help="Python file with a plugin."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


@click.group()
def plugins() -> None:
    """Quantizers, tuners, range estimators, loaders and finishers that are installed.

    A plugin that can't be used is listed with the reason; QCONVERT_PLUGINS=a,b uses those distributions' plugins only, and
    QCONVERT_PLUGINS= none.
    """


@plugins.command(name="list")
@FILES
@JSON
def list_plugins(files: tuple[Path, ...], as_json: bool) -> None:
    """List what every plugin brings: name, kind, distribution, version, API version, schemes, whether it needs data.

    stdout: a table, or with --json a document.
    """
    with _quiet():
        from qconvert.plugin.host.catalogue import document, entries
        from qconvert.plugin.host.manager import plugin_manager
        from qconvert.report.catalogue import table

        found = plugin_manager(files)
        shown = entries(found)
    if as_json:
        emit(json.dumps(document(shown, found.broken), indent=2))
    else:
        emit_table(table(shown, found.broken))


@plugins.command()
@click.argument("name")
@FILES
@JSON
def show(name: str, files: tuple[Path, ...], as_json: bool) -> None:
    """Show one of them: its options with types, defaults and what they do, its schemes, where it comes from.

    NAME is a quantizer, a tuner, a range estimator, a distribution or a module. stdout: a page, or with --json a document.
    """
    with _quiet():
        from qconvert.plugin.host.catalogue import entries
        from qconvert.plugin.host.manager import plugin_manager
        from qconvert.report.catalogue import page

        found = plugin_manager(files)
        matching = [entry for entry in entries(found) if name in (entry.name, entry.value, entry.distribution)]
        if not matching:
            raise found.unknown(name)
    if as_json:
        emit(json.dumps([entry.document() for entry in matching], indent=2))
    else:
        for entry in matching:
            emit_table(page(entry))


@plugins.command()
@FILES
def schema(files: tuple[Path, ...]) -> None:
    """Print the JSON schema of a recipe, with the options of all quantizers, tuners and estimators, for editors of YAML."""
    with _quiet():
        from qconvert.plugin.host.catalogue import recipe_schema
        from qconvert.plugin.host.manager import plugin_manager

        document = recipe_schema(plugin_manager(files))
    emit(json.dumps(document, indent=2))


@contextmanager
def _quiet() -> Iterator[None]:
    """Send to stderr what plugins print within the context; that one is broken is in the result, and needs no warning."""
    from qconvert.cli.terminal import StderrConsole, working

    logger = logging.getLogger("qconvert.plugin")
    with working(StderrConsole()), importing():
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@plugins.command()
@click.argument("name", metavar="NAME|FILE")
@click.option(
    "--plugin-timeout", type=float, metavar="SECONDS", default=60.0, help="What one call of it may take.", show_default=True
)
@JSON
def check(name: str, plugin_timeout: float, as_json: bool) -> None:
    """Run the conformance suite on a quantizer, on all of a distribution, or on those of a Python file.

    stderr: a line per check. stdout: the verdict, and what failed, or with --json a document. Exit code 4 if one
    fails that is not expected to.
    """
    from qconvert.cli.terminal import StderrConsole

    console = StderrConsole()
    results: dict[str, list[CheckResult]] = {}
    with _quiet():
        from qconvert.plugin.host import calls
        from qconvert.plugin.host.manager import plugin_manager
        from qconvert.testing import check_quantizer

        calls.limit_calls(plugin_timeout)
        found = plugin_manager((Path(name),) if name.endswith(".py") else ())
        wanted = {name, Path(name).name}
        kinds = [
            kind
            for kind_name, owners in found.quantizers.items()
            for kind, plugin in owners
            if wanted & {kind_name, plugin.value, plugin.distribution.name}
        ]
        if not kinds:
            raise found.unknown(name)
        for kind in kinds:
            results[kind.name] = check_quantizer(
                found.quantizer(kind.name, {}), lambda result: console.print(_line(result), highlight=False, markup=False)
            )
    if as_json:
        emit(json.dumps({key: [asdict(result) for result in value] for key, value in results.items()}, indent=2))
    else:
        emit("\n".join(f"{key}: {_verdict(value)}" for key, value in results.items()))
    if any(result.status == "failed" for value in results.values() for result in value):
        sys.exit(PluginError.exit_code)


def _line(result: CheckResult) -> str:
    return f"{result.status:9}{result.name}{f': {result.message}' if result.message else ''}"


def _verdict(results: list[CheckResult]) -> str:
    counts = {status: sum(result.status == status for result in results) for status in ("passed", "expected", "failed")}
    words = f"{counts['passed']} of {len(results)} checks passed"
    if counts["expected"]:
        words += f", {counts['expected']} fail as expected"
    return words + "".join(f"\n{_line(result)}" for result in results if result.status == "failed")


@plugins.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def new(folder: Path) -> None:
    """Make the repository of a new quantizer plugin: module, tests, project file, CI file and README, which all pass.

    The quantizer gets the folder's name: qconvert-kmeans brings kmeans. stdout: the folder.
    """
    with _quiet():
        from qconvert.plugin.host.scaffold import new_plugin

        new_plugin(folder)
    emit(str(folder))
