"""The verbs: what a command may ask, the arguments it takes, and how it is treated. One table, published at birth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from device_agents.live import live_fields
from device_agents.settings import NAME, AgentSettings, Mode
from edge_adapt.errors import ConfigError, did_you_mean

MOST_LABELS, MOST_FIELDS, MOST_TEXT = 1024, 32, 256
SHOWN_ERRORS, SHOWN_TEXT = 4, 80
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]


class Arguments(BaseModel):
    """What a verb takes: nothing, unless a subclass says so."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @property
    def risky(self) -> bool:
        """For a verb that may be dangerous: whether it is with these arguments."""
        return True


class Restore(Arguments):
    slot: Literal["source", "own", "adapter"] = Field(
        description="what shall answer: the model as exported, or the latest snapshot of what was learned, or of an "
        "adapter from outside"
    )


class Freeze(Arguments):
    on: bool = Field(description="true: learn nothing until told otherwise")


class SetMode(Arguments):
    mode: Mode

    @property
    def risky(self) -> bool:
        return self.mode == "bounded_auto"


class SetConfig(Arguments):
    config: dict[str, Any] = Field(
        min_length=1, max_length=MOST_FIELDS, description="dotted name of a live field -> number, text, boolean or null"
    )
    dry_run: bool = Field(False, description="check and show the differences; change nothing")

    @field_validator("config")
    @classmethod
    def _live(cls, config: dict[str, Any]) -> dict[str, Any]:
        known = live_fields(AgentSettings)
        for name, value in config.items():
            if name not in known:
                raise ValueError(f"{_shown(name)} is no live field; {did_you_mean(name[:SHOWN_TEXT], known)}")
            if isinstance(value, (dict, list)) or (isinstance(value, str) and len(value) > MOST_TEXT):
                raise ValueError(f"{name} is {_shown(value)}; expected a number, a short text, true, false or null")
        return config

    @property
    def risky(self) -> bool:
        return self.config.get("mode") == "bounded_auto" and not self.dry_run


class LoadAdapter(Arguments):
    """The signed package to load, named in one of three ways."""

    url: Annotated[str, Field(pattern=r"^https?://[!-~]+$", max_length=1024)] | None = Field(
        None, description="where to fetch it"
    )
    file: Name | None = Field(None, description="name of a file in the inbox folder of the device")
    transfer: Name | None = Field(None, description="id of a transfer in chunks that is complete")
    sha256: Sha256 = Field(description="of the package")

    @model_validator(mode="after")
    def _one(self) -> LoadAdapter:
        if sum(way is not None for way in (self.url, self.file, self.transfer)) != 1:
            raise ValueError("expected one of `url`, `file` and `transfer`")
        return self


class Record(Arguments):
    on: bool
    seconds: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = Field(
        None, description="stop after so long; none: when told"
    )


class LabelReveal(Arguments):
    labels: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = Field(
        min_length=1, max_length=MOST_LABELS, description="[frame number, class index] of each"
    )


class LogLevel(Arguments):
    level: Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True)
class Verb:
    """One thing that may be asked."""

    name: str
    description: str
    arguments: type[Arguments] = Arguments
    heavy: bool = False
    """One of these at a time; another one is refused as long as it runs."""
    slow: bool = False
    """A heavy one that has to wait for another machine: lighter ones do not wait for it."""
    danger: bool = False
    """Needs a reason where its arguments are risky, and is audited."""
    repeatable: bool = False
    """Does no harm twice, and helps in trouble: may run although the ledger cannot be used."""

    def needs_reason(self, arguments: Arguments) -> bool:
        """Whether this command needs a reason."""
        return self.danger and arguments.risky

    def parse(self, arguments: Mapping[str, Any]) -> Arguments:
        """Check arguments as they came. Raises: ConfigError that names every wrong one."""
        try:
            return self.arguments.model_validate(arguments)
        except ValidationError as error:
            fields = self.arguments.model_fields
            raise ConfigError(
                f"the arguments of {self.name} are wrong: {_told(error, fields)}",
                remedy=f"it takes: {', '.join(fields) or 'no arguments'}",
            ) from error

    def as_dict(self) -> dict[str, Any]:
        """For the birth document: description, flags, JSON Schema of the arguments."""
        schema = self.arguments.model_json_schema()
        return {
            "description": self.description,
            "heavy": self.heavy,
            "danger": self.danger,
            "arguments": {name: schema[name] for name in ("properties", "required", "$defs") if schema.get(name)},
        }


def verb(name: str) -> Verb:
    """Look a verb up. Raises: ConfigError with the nearest known ones."""
    if name not in VERBS:
        raise ConfigError(f"there is no command {_shown(name)}", remedy=did_you_mean(name[:SHOWN_TEXT], VERBS))
    return VERBS[name]


def catalogue() -> dict[str, Any]:
    """Verb -> what it is and takes, for the birth document."""
    return {name: found.as_dict() for name, found in VERBS.items()}


def _told(error: ValidationError, fields: Mapping[str, Any]) -> str:
    """The first few errors, each with the path of the argument; what came is cut short."""
    told = []
    for found in error.errors(include_url=False, include_context=False)[:SHOWN_ERRORS]:
        where = ".".join(repr(part).strip("'")[:SHOWN_TEXT] for part in found["loc"])
        if found["type"] == "extra_forbidden":
            told.append(f"{_shown(where)} is no argument; {did_you_mean(where[:SHOWN_TEXT], fields)}")
        elif found["type"] == "missing":
            told.append(f"`{where}` is missing")
        else:
            got = "" if found["type"] == "value_error" else f", got {_shown(found['input'])}"
            message = found["msg"].removeprefix("Value error, ")
            told.append(f"{f'`{where}`: ' if where else ''}{message}{got}")
    left = error.error_count() - len(told)
    return "; ".join(told) + (f"; and {left} more" if left else "")


def _shown(value: Any) -> str:
    """What came, on one line, cut short: containers by their type, since they may be huge."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value if not isinstance(value, str) else value[:SHOWN_TEXT])
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}..."


VERBS: Mapping[str, Verb] = {
    found.name: found
    for found in (
        Verb("ping", "Answer, and do nothing else.", repeatable=True),
        Verb("rebirth", "Publish state, birth and reported again.", repeatable=True),
        Verb("snapshot", "Save what was learned, now.", heavy=True),
        Verb("restore", "Put source or the latest snapshot of a slot in force.", Restore, heavy=True),
        Verb("rollback", "Go back to the adapter before this one."),
        Verb("reset", "Go back to source and forget what was learned.", danger=True, repeatable=True),
        Verb("freeze", "Stop learning, or go on.", Freeze, repeatable=True),
        Verb("set-mode", "Set how much the agent may do alone.", SetMode, danger=True, repeatable=True),
        Verb("set-config", "Change live settings, until the next restart.", SetConfig, danger=True),
        Verb("load-adapter", "Load a signed adapter on probation.", LoadAdapter, heavy=True, slow=True, danger=True),
        Verb("commit-adapter", "Trust the adapter that is on probation.", heavy=True),
        Verb("drain", "Finish what waits, save, and stop.", heavy=True),
        Verb("record", "Start or stop the recording of frames.", Record),
        Verb("label-reveal", "Tell true classes of frames, to measure by.", LabelReveal),
        Verb("log-level", "Set how much is logged.", LogLevel, repeatable=True),
    )
}
