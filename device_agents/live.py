"""Live settings: which fields may change while the agent runs, and how values from outside are merged into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from edge_adapt.errors import ConfigError, did_you_mean

MOST_REFUSALS, MOST_HINTS, SHOWN_TEXT = 32, 4, 160
NEEDS_RESTART = "needs a restart: change it in the file of the device"
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Refusal:
    """A field that was not put in force."""

    field: str
    why: str


class Unfit(ConfigError):
    """Some of the values cannot be put in force."""

    def __init__(self, refusals: tuple[Refusal, ...]) -> None:
        told = "; ".join(f"`{one.field}` {one.why}" for one in refusals)
        super().__init__(told, remedy="`edge-adapt check --schema` prints every field, its type and whether it is live")
        self.refusals = refusals


@dataclass(frozen=True)
class Sorted:
    """Values from outside, by what may be done with them."""

    live: Mapping[str, Any]
    needs_restart: tuple[Refusal, ...] = ()
    wrong: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class _Fields:
    """Dotted names of the fields of a model."""

    live: frozenset[str]
    fixed: frozenset[str]
    """Fields that need a restart."""
    open: frozenset[str]
    """Fields that need a restart and hold what they like."""


def live_fields(model: type[BaseModel]) -> frozenset[str]:
    """Dotted names of the fields of `model` that may change while it is in force."""
    return _fields(model).live


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested objects -> dotted names. An empty object says nothing and vanishes."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found.update({f"{name}.{below}": inner for below, inner in flat(value).items()})
        else:
            found[name] = value
    return found


def sort_out(settings: BaseModel, wished: Mapping[str, Any]) -> Sorted:
    """Tell live fields from those that need a restart and differ, and from those that are unknown or wrong."""
    fields, now = _fields(type(settings)), flat(settings.model_dump(mode="json"))
    live: dict[str, Any] = {}
    restart: list[Refusal] = []
    wrong: list[Refusal] = []
    for name, value in wished.items():
        if name in fields.live:
            live[name] = value
        elif name in fields.fixed or name.startswith(tuple(f"{one}." for one in fields.open)):
            if now.get(name) != value:
                restart.append(Refusal(_shown(name), NEEDS_RESTART))
        else:
            wrong.append(Refusal(_shown(name), _unknown(name, fields) if len(wrong) < MOST_HINTS else "is no setting"))
    try:
        merged(settings, live)
    except Unfit as error:
        wrong.extend(error.refusals)
    return Sorted(live, tuple(restart[:MOST_REFUSALS]), tuple(wrong[:MOST_REFUSALS]))


def merged(settings: M, wished: Mapping[str, Any]) -> M:
    """Settings with some live fields replaced: dotted name -> value as JSON has it.

    Raises: Unfit if a value is wrong; types are strict, so that `"5"` is no number.
    """
    try:
        return type(settings).model_validate(_replaced(settings, wished), strict=True)
    except ValidationError as error:
        raise Unfit(refusals(error)) from error


def refusals(error: ValidationError) -> tuple[Refusal, ...]:
    """The errors of pydantic, each with its field; what came is cut short."""
    return tuple(
        Refusal(_shown(".".join(map(str, one["loc"]))), f"{one['msg'][:SHOWN_TEXT]}, got {_shown(repr(one['input']))}")
        for one in error.errors(include_url=False, include_context=False)[:MOST_REFUSALS]
    )


def _unknown(name: str, fields: _Fields) -> str:
    return f"is no setting; {did_you_mean(name[:SHOWN_TEXT], fields.live | fields.fixed)[:SHOWN_TEXT]}"


def _replaced(settings: BaseModel, wished: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model, by name; groups that are touched as such a dict again, others as they are."""
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    groups: dict[str, dict[str, Any]] = {}
    for name, value in wished.items():
        group, _, below = name.partition(".")
        if below:
            groups.setdefault(group, {})[below] = value
        else:
            values[group] = value
    return values | {group: _replaced(getattr(settings, group), below) for group, below in groups.items()}


@cache
def _fields(model: type[BaseModel]) -> _Fields:
    found = list(_walk(model, "", True))
    return _Fields(
        live=frozenset(name for name, live, _ in found if live),
        fixed=frozenset(name for name, live, _ in found if not live),
        open=frozenset(name for name, live, is_open in found if not live and is_open),
    )


def _walk(model: type[BaseModel], prefix: str, live: bool) -> Iterator[tuple[str, bool, bool]]:
    """Name, whether it is live, whether it holds what it likes; a live group is no field itself, a fixed one is."""
    for name, field in model.model_fields.items():
        is_live = live and _is_live(field)
        group = _group(field)
        if group is not None:
            yield from _walk(group, f"{prefix}{name}.", is_live)
        if group is None or not is_live:
            yield f"{prefix}{name}", is_live, "dict" in str(field.annotation)


def _is_live(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("live") is True


def _group(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a group, be it optional."""
    for one in (field.annotation, *get_args(field.annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


def _shown(text: str) -> str:
    """What came, as ASCII on one line, cut short."""
    plain = text[: SHOWN_TEXT + 1].encode("ascii", "backslashreplace").decode().replace("\n", " ")
    return plain if len(plain) <= SHOWN_TEXT else f"{plain[:SHOWN_TEXT]}..."
