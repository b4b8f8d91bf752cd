"""`edge-adapt check` and `edge-adapt acl`: arguments only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

YAML = (".yaml", ".yml")


def check(
    path: Annotated[Path | None, typer.Argument(help="folder of a bundle, or configuration (.yaml)")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON Schema of configurations instead")] = False,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="have every graph of the bundle built by TensorRT too")
    ] = False,
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
        find(CHECKS, "bundle")(path, tensorrt=tensorrt)


def acl(
    configs: Annotated[list[Path], typer.Argument(help="configurations of devices of one site; others get in as well")],
    controllers: Annotated[
        list[str] | None, typer.Option("--controller", help="user who may command; may be given twice")
    ] = None,
    readers: Annotated[
        list[str] | None, typer.Option("--reader", help="user who may read everything; may be given twice")
    ] = None,
    home_assistant: Annotated[str | None, typer.Option(help="user that Home Assistant logs in as")] = None,
) -> None:
    """Print the `acl_file` of mosquitto for a site: every device reaches its own topics alone."""
    from device_agents.acl import acl_of
    from device_agents.settings import AgentSettings
    from edge_adapt.config import load_config

    devices = [load_config(path, AgentSettings) for path in configs]
    text = acl_of(devices, controllers=controllers or (), readers=readers or (), home_assistant=home_assistant)
    typer.echo(text, nl=False)
