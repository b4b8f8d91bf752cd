"""The command `edge-adapt`. Its commands come by entry point: this package imports no exporter and no benchmark."""

from __future__ import annotations

import logging
import sys
from typing import Any

import typer

from edge_adapt.errors import EdgeAdaptError
from edge_adapt.plugins import COMMANDS, find, names, sound

INTERRUPTED, WRONG = 130, 2
USAGE_ERROR: Any = typer.BadParameter.__mro__[2]
"""Base of every complaint about arguments; some versions of typer bring it along, others import it from click."""


def build(asked: str | None = None) -> typer.Typer:
    """The command line with everything that is installed. Commands import what they need when they run.

    Args:
        asked: the command that was called; if it is installed, the others are not even loaded.
    """
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Continual test-time adaptation for edge devices.",
    )
    app.callback()(lambda: None)  # without it a single command would lose its name
    for name, command in _commands(asked).items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def _commands(asked: str | None) -> dict[str, Any]:
    """By name: the one that was called, or all that can be loaded."""
    return {asked: find(COMMANDS, asked)} if asked is not None and asked in names(COMMANDS) else sound(COMMANDS)


def main() -> None:
    """Run, and turn what a user can do wrong into one clear message: 2 for an error, 130 for Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Exit code of one call."""
    try:
        code = build(arguments[0] if arguments else None)(args=arguments, prog_name="edge-adapt", standalone_mode=False)
    except EdgeAdaptError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        return WRONG
    except (KeyboardInterrupt, typer.Abort):
        typer.secho("interrupted", err=True)
        return INTERRUPTED
    except typer.Exit as leaving:
        return leaving.exit_code
    except USAGE_ERROR as error:
        error.show()
        return WRONG
    return code if isinstance(code, int) else 0
