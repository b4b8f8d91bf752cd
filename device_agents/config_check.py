"""What stands in the way of running with a configuration: looks at everything that it names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from device_agents.settings import AgentSettings
from edge_adapt.bundle import Bundle
from edge_adapt.config import json_schema, read_config, refusal
from edge_adapt.errors import ConfigError, EdgeAdaptError
from edge_adapt.located import Loc
from edge_adapt.plugins import ENGINES, METHODS, WRAPPERS, find

MAX_KEY_BYTES = 64 * 1024
"""No key and no certificate is larger."""


def checked(path: Path) -> AgentSettings:
    """The settings of a file. Raises: ConfigError with all that is wrong with them, or with what they name."""
    document = read_config(path, AgentSettings)
    wrong = [document.problem(loc, f"{error.what}; {error.remedy}") for loc, error in failures(document.settings)]
    if wrong:
        raise refusal(document.where, wrong)
    return document.settings


def failures(settings: AgentSettings) -> list[tuple[Loc, EdgeAdaptError]]:
    """Everything that is missing or does not fit, with the place of the setting that names it."""
    found: list[tuple[Loc, EdgeAdaptError]] = []
    for loc, look in _looks(settings):
        try:
            look()
        except EdgeAdaptError as error:
            found.append((loc, error))
    if not found:
        try:
            _method_fits(settings)
        except EdgeAdaptError as error:
            found.append((("method",), error))
    return found


def schema_text() -> str:
    """The JSON Schema of a configuration, as it is published."""
    return json.dumps(json_schema(AgentSettings), indent=2) + "\n"


def _looks(settings: AgentSettings) -> Iterator[tuple[Loc, Callable[[], object]]]:
    """What to look at, each on its own; raises EdgeAdaptError if it is wrong."""
    from edge_adapt.methods.auto import AUTO

    yield ("bundle",), partial(Bundle.load, settings.bundle)
    yield ("engine", "name"), partial(find, ENGINES, settings.engine.name)
    host, *wrappers = settings.method.name.split("+")
    if host != AUTO:
        yield ("method", "name"), partial(find, METHODS, host)
    for name in wrappers:
        yield ("method", "name"), partial(find, WRAPPERS, name)
    if settings.source.path is not None:
        yield ("source", "path"), partial(_there, settings.source.path, folder=settings.source.kind == "folder")
    for loc, file in _files(settings):
        yield loc, partial(_readable, file)


def _method_fits(settings: AgentSettings) -> None:
    """Raises: ConfigError if the bundle cannot serve the method, or if a setting of the method is wrong."""
    from edge_adapt.methods.catalogue import build
    from edge_adapt.methods.protocol import Context
    from edge_adapt.tail import Tail

    bundle, method = Bundle.load(settings.bundle), settings.method
    try:
        build(method.name, Context(bundle, partial(Tail, bundle), method.seed, method.settings))
    except (TypeError, ValueError, AttributeError) as error:  # a setting of a wrong type, met while calculating
        raise ConfigError(f"{method.name} cannot be built: {error}", remedy="check `settings` of the method") from error


def _files(settings: AgentSettings) -> Iterator[tuple[Loc, Path]]:
    """Keys and certificates."""
    if settings.mqtt is None:
        return
    named: list[tuple[Loc, Path | None]] = [(("mqtt", "password_file"), settings.mqtt.password_file)]
    if settings.mqtt.tls is not None:
        tls = settings.mqtt.tls
        named += [(("mqtt", "tls", name), getattr(tls, name)) for name in ("ca", "certificate", "key")]
    named += [(("mqtt", "trusted_keys", index), key) for index, key in enumerate(settings.mqtt.trusted_keys)]
    yield from ((loc, path) for loc, path in named if path is not None)


def _readable(path: Path) -> None:
    """Raises: ConfigError if a small file cannot be read, or holds nothing."""
    _there(path, folder=False)
    try:
        with path.open("rb") as file:
            size = len(file.read(MAX_KEY_BYTES + 1))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", remedy="give the agent's user the right"
        ) from error
    if not 0 < size <= MAX_KEY_BYTES:
        what = "is empty" if size == 0 else f"is larger than {MAX_KEY_BYTES // 1024} KiB"
        raise ConfigError(f"{path} {what}", remedy="check that it is the right file")


def _there(path: Path, *, folder: bool) -> None:
    if folder and not path.is_dir():
        raise ConfigError(f"{path} is no folder", remedy="make it, or correct the path")
    if not folder and not path.is_file():
        raise ConfigError(f"{path} does not exist", remedy="correct the path")
