"""Configuration files: YAML -> a strict pydantic model. Every error at once, each with its line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import pydantic_core
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from edge_adapt.errors import ConfigError, did_you_mean
from edge_adapt.located import MAX_BYTES, Loc, Located, Problem, dotted, read, short

M = TypeVar("M", bound=BaseModel)

SHOWN = 40
"""Errors in one message; the others are counted."""
DIALECT = "https://json-schema.org/draft/2020-12/schema"
EXPECTED = {
    "model_type": "settings, each on a line of its own and indented",
    "dict_type": "settings, each on a line of its own and indented",
    "tuple_type": "a list",
    "string_type": "text; quotes make a number one",
    "bool_type": "true or false",
}


@dataclass(frozen=True)
class Document(Generic[M]):
    """A configuration that was read, and where each of its settings stands."""

    settings: M
    where: str
    """Name of the file."""
    lines: dict[Loc, int] = field(default_factory=dict)

    def problem(self, loc: Loc, text: str) -> Problem:
        """Something that is wrong with a setting, at its line or at that of the nearest one around it."""
        return Problem(Located(lines=self.lines).line(loc), f"{dotted(loc)}: {text}")


@dataclass(frozen=True)
class Change:
    """One setting that two configurations do not share."""

    path: str
    """Such as `budget.learn_ms_per_s`."""
    old: Any
    new: Any
    live: bool
    """True if it may change while the agent runs."""

    def __str__(self) -> str:
        when = "now" if self.live else "after a restart"
        return f"{self.path}: {self.old} -> {self.new} ({when})"


def load_config(path: Path, model: type[M]) -> M:
    """Read a configuration file. Relative paths in it are relative to its folder.

    Raises: ConfigError with every error of the file, each with its line. A file whose last line does not end counts
    as half written.
    """
    return read_config(path, model).settings


def read_config(path: Path, model: type[M]) -> Document[M]:
    """`load_config`, with the lines of the settings."""
    try:
        if not path.is_file():
            reason = "is a folder" if path.is_dir() else "does not exist"
            raise ConfigError(f"the configuration {path} {reason}", remedy="give a .yaml file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error}", remedy="check the file") from error
    document = parse_document(data, model, str(path), folder=path.absolute().parent)
    if not data.endswith(b"\n"):
        last = data.count(b"\n") + 1
        raise refusal(str(path), [Problem(last, "the last line does not end: is the file only half written?")])
    return document


def parse_config(text: str | bytes, model: type[M], where: str, *, folder: Path | None = None) -> M:
    """Settings from a text; JSON is read too. `where` names it in errors. Raises: ConfigError with every error.

    Relative paths are relative to `folder`, if one is given.
    """
    return parse_document(text, model, where, folder=folder).settings


def parse_document(text: str | bytes, model: type[M], where: str, *, folder: Path | None = None) -> Document[M]:
    """`parse_config`, with the lines of the settings."""
    return validated(read(text), model, where, folder=folder)


def validated(found: Located, model: type[M], where: str, *, folder: Path | None = None) -> Document[M]:
    """`parse_document` of a text that was read already."""
    problems = list(found.problems)
    if not found.broken:
        try:
            # As JSON, strict still lets a text be a path and a list be a tuple.
            settings = model.model_validate_json(pydantic_core.to_json(found.value), strict=True)
        except ValidationError as error:
            problems += _explained(error, model, found)
    if problems:
        raise refusal(where, problems)
    return Document(_rooted(settings, folder) if folder is not None else settings, where, found.lines)


def changes(old: M, new: M) -> list[Change]:
    """Settings that differ, in the order of the model. A setting is live if it, and all around it, are marked so."""
    return list(_changes(old, new, "", live=True))


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a configuration; `live` marks what may change while the agent runs."""
    return {"$schema": DIALECT, **model.model_json_schema()}


def refusal(where: str, problems: list[Problem]) -> ConfigError:
    """One error for all that is wrong, in the order of the file."""
    problems = sorted(set(problems), key=lambda problem: problem.line)
    told = [f"{where}:{problem.line}: {problem.text}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        told.append(f"and {len(problems) - SHOWN} more")
    if len(problems) == 1:
        return ConfigError(told[0], remedy="correct that line; `edge-adapt check --schema` lists every setting")
    lines = "\n  ".join(told)
    return ConfigError(
        f"{where} has {len(problems)} errors\n  {lines}",
        remedy="correct these lines; `edge-adapt check --schema` lists every setting",
    )


def _changes(old: BaseModel, new: BaseModel, prefix: str, *, live: bool) -> Iterator[Change]:
    for name, info in type(old).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        marked = live and _is_live(info)
        if isinstance(before, BaseModel) and type(before) is type(after):
            yield from _changes(before, after, f"{prefix}{name}.", live=marked)
        elif before != after:
            yield Change(prefix + name, before, after, marked)


def _is_live(info: FieldInfo) -> bool:
    extra = info.json_schema_extra
    return isinstance(extra, dict) and extra.get("live") is True


def _rooted(value: Any, folder: Path) -> Any:
    """The same with relative paths below a folder."""
    if isinstance(value, Path):
        return folder / value
    if isinstance(value, BaseModel):
        parts = {name: getattr(value, name) for name in type(value).model_fields}
        rooted = {name: _rooted(part, folder) for name, part in parts.items()}
        return value.model_copy(update={name: part for name, part in rooted.items() if part is not parts[name]})
    if isinstance(value, (tuple, list)):
        return type(value)(_rooted(part, folder) for part in value)
    return value


def _explained(error: ValidationError, model: type[BaseModel], found: Located) -> list[Problem]:
    """What pydantic found, with lines. Complaints of the members of a union about one value become one."""
    grouped: dict[Loc, list[Any]] = {}
    for complaint in error.errors(include_url=False):
        loc = complaint["loc"] if complaint["type"] == "missing" else _within(complaint["loc"], found.value)
        grouped.setdefault(loc, []).append(complaint)
    return [Problem(found.line(loc), _told(loc, complaints, model)) for loc, complaints in grouped.items()]


def _within(loc: Loc, value: Any) -> Loc:
    """The part of a location that the text has; pydantic appends the name of the member of a union."""
    for depth, part in enumerate(loc):
        held = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        if part not in held:
            return loc[:depth]
        value = value[part]
    return loc


def _told(loc: Loc, complaints: list[Any], model: type[BaseModel]) -> str:
    name, first = dotted(loc) or "the configuration", complaints[0]
    if first["type"] == "missing":
        info = _fields(model, loc[:-1]).get(str(loc[-1]))
        return f"{name} is missing" + (f": {info.description}" if info is not None and info.description else "")
    if first["type"] == "extra_forbidden":
        return f"{name} is no setting; {did_you_mean(str(loc[-1]), _fields(model, loc[:-1]))}"
    if first["type"] == "value_error":
        return f"{name}: {first['ctx']['error']}"
    expected = [EXPECTED.get(one["type"]) or one["msg"].removeprefix("Input should be ") for one in complaints]
    found = "empty" if first["input"] is None else short(first["input"])
    return f"{name} is {found}, expected {', or '.join(dict.fromkeys(expected))}"


def _fields(model: type[BaseModel], loc: Loc) -> dict[str, FieldInfo]:
    """The settings that a location may hold."""
    models = [model]
    for part in loc:
        if isinstance(part, str):
            inner = [one.model_fields[part].annotation for one in models if part in one.model_fields]
            models = [found for annotation in inner for found in _models(annotation)]
    return {name: info for one in models for name, info in one.model_fields.items()}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Models that a type names, such as the one in `MqttSettings | None`."""
    parts = get_args(annotation)
    if not parts and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in parts for found in _models(part)]
