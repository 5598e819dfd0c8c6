"""`qconvert plugins`: what plugins there are, and what they bring."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from qconvert.cli.stdout import emit, emit_table
from qconvert.ir.garbage import importing

FILES = click.option(
    "--plugin", "files", metavar="FILE", multiple=True, type=click.Path(path_type=Path), help="Python file with a plugin."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


@click.group()
def plugins() -> None:
    """Quantizers, loaders and finishers that are installed.

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
        from qconvert.plugin.catalogue import document, entries
        from qconvert.plugin.manager import plugin_manager
        from qconvert.report.catalogue import table

        found = plugin_manager(files)
        shown, told = entries(found), document(found)
    if as_json:
        emit(json.dumps(told, indent=2))
    else:
        emit_table(table(shown, found.broken))


@plugins.command()
@click.argument("name")
@FILES
@JSON
def show(name: str, files: tuple[Path, ...], as_json: bool) -> None:
    """Show one of them: its options with types, defaults and what they do, its schemes, where it comes from.

    NAME is a quantizer, a distribution or a module. stdout: a page, or with --json a document.
    """
    with _quiet():
        from qconvert.plugin.catalogue import entries
        from qconvert.plugin.manager import plugin_manager
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
    """Print the JSON schema of a recipe, with the options of every quantizer, for editors that complete and check YAML."""
    with _quiet():
        from qconvert.plugin.catalogue import recipe_schema
        from qconvert.plugin.manager import plugin_manager

        document = recipe_schema(plugin_manager(files))
    emit(json.dumps(document, indent=2))


@contextmanager
def _quiet() -> Iterator[None]:
    """What plugins print goes to stderr; that one is broken is in the result, and needs no warning."""
    from qconvert.cli.terminal import StderrConsole, working

    logger = logging.getLogger("qconvert.plugin")
    with working(StderrConsole()), importing():
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
