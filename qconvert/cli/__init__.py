"""The command line. One module per command, imported when that command is asked for: `--help` needs none of torch,
transformers, pydantic or plugins."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from qconvert.cli.exits import exit_codes
from qconvert.supervision import parent
from qconvert.supervision.child import import_path, tell_done

COMMANDS = {
    "run": "qconvert.cli.run",
    "plan": "qconvert.cli.plan",
    "verify": "qconvert.cli.verify",
    "compare": "qconvert.cli.compare",
    "plugins": "qconvert.cli.plugins",
}


class Commands(click.Group):
    """Commands by name, each the object of that name in its module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, without importing any."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command, and return the command; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[cmd_name]), cmd_name)
        return command

    def main(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:
        """Run the command line in a process that this one watches, or here where nobody need watch."""
        if args is None:
            os.environ.update(import_path())  # for all that is started from here, plugins' processes included
            if parent.is_needed(sys.argv[1:]):
                with exit_codes(as_json="--json" in sys.argv):
                    sys.exit(parent.run(sys.argv[1:]))
            parent.begin()
        try:
            return super().main(args, *others, **settings)
        except SystemExit as leaving:
            tell_done(leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None))
            raise

    def invoke(self, ctx: click.Context) -> Any:
        # Errors in flags come before --json is parsed, hence the look at the arguments themselves.
        """Run a command, and exit with the code of what it raises."""
        with exit_codes(as_json="--json" in ctx.args):
            return super().invoke(ctx)


@click.command(cls=Commands, context_settings={"max_content_width": 120})
def main() -> None:
    """Turns a trained checkpoint into small, fast, portable artifacts, and proves that they work.

    \b
    qconvert run --model DIR --output OUT --preset balanced

    \b
    Exit codes: 0 done, 1 a gate was missed, 2 usage, 3 input rejected, 4 a plugin failed, 5 parity failed,
    6 resources, 7 a target could not be run here, 70 internal error, 130 interrupted.
    """
