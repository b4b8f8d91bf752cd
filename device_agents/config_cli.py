"""`edge-adapt check`: arguments only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

YAML = (".yaml", ".yml")


def check(
    path: Annotated[Path | None, typer.Argument(help="folder of a bundle, or configuration (.yaml)")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON Schema of configurations instead")] = False,
) -> None:
    """Verify a bundle (hashes, schema, parity) or a configuration and what it names. Exit code 2 if it is wrong."""
    from device_agents import config_check
    from edge_adapt.errors import ConfigError
    from edge_adapt.plugins import CHECKS, find

    if schema:
        typer.echo(config_check.schema_text(), nl=False)
    elif path is None:
        raise ConfigError("there is nothing to check", remedy="give a bundle or a .yaml file, or --schema")
    elif path.suffix.lower() in YAML and not path.is_dir():
        settings = config_check.checked(path)
        broker = f"{settings.mqtt.host}:{settings.mqtt.port}" if settings.mqtt is not None else "none"
        typer.echo(f"  ok: {path}", err=True)
        typer.echo(
            f"{settings.site}/{settings.device}: mode {settings.mode}, method {settings.method.name}, "
            f"source {settings.source.kind}, broker {broker}"
        )
    else:
        find(CHECKS, "bundle")(path)
