"""The shadow: settings that somebody desires, checked and put in force, and what is reported back."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from device_agents.envelope import unwrap
from device_agents.live import Refusal, Unfit, flat, live_fields, merged, refusals, sort_out
from device_agents.settings import AgentSettings
from edge_adapt.config import Change, changes
from edge_adapt.delta import write_atomically
from edge_adapt.errors import ConfigError, EdgeAdaptError

if TYPE_CHECKING:
    from device_agents.mqtt import Incoming

LOG = logging.getLogger(__name__)
Version = Annotated[int, Field(ge=0, le=2**53)]
MOST_SAVED = 1 << 20


class _Document(BaseModel):
    """What comes on the topic `desired`."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    ver: Version
    config: dict[str, Any] = {}


class _Saved(_Document):
    """The document that was applied last, as it lies on disk."""

    ver: Version = 0
    reported_ver: Version = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a desired document."""

    text: str
    applied: bool = False
    changes: tuple[Change, ...] = ()
    rejected: tuple[Refusal, ...] = ()
    """Fields that were left out, or that the whole was refused for."""


class Desired:
    """Settings in three layers: the file, the desired document over it, and single commands over that.

    A document is whole: a field that a later version leaves out falls back to the file, so that a device that missed
    some versions ends like one that saw all. Commands last until the restart, and change no field of the document.
    Thread-safe; `apply` is called under the lock.

    Args:
        settings: as read from the file.
        apply: puts settings in force; raises EdgeAdaptError if it cannot, and nothing changed then. It is not called
            for the settings that are in force from the beginning: read them from `settings`.
        path: file that keeps the document which was applied last.
    """

    def __init__(self, settings: AgentSettings, apply: Callable[[AgentSettings], None], *, path: Path) -> None:
        self._lock = threading.RLock()
        self._file, self._apply, self._path = settings, apply, path
        self._commands: dict[str, Any] = {}
        self._rejected: tuple[Refusal, ...] = ()
        self.trouble: str | None = None
        """What was wrong with the document on disk, or with writing it; none: nothing."""
        saved = self._load()
        self._applied, self._version, wished = saved.ver, saved.reported_ver, flat(saved.config)
        try:
            self._settings, self._wished = merged(settings, wished), wished
        except (Unfit, AttributeError) as error:  # the program changed under the document
            self._settings, self._wished, self._applied = settings, {}, 0
            self.trouble = f"the document {path} does not fit these settings any more: {error}"

    @property
    def settings(self) -> AgentSettings:
        """What is in force."""
        with self._lock:
            return self._settings

    @property
    def applied_version(self) -> int:
        """Version of the document that was applied last; 0: none."""
        with self._lock:
            return self._applied

    def receive(self, incoming: Incoming, *, limit: int) -> Outcome:
        """`take` what came over the network, of at most `limit` bytes. Never raises for what it holds."""
        try:
            document = unwrap(incoming.payload, limit=limit).get("d")
        except ConfigError as error:
            return Outcome(f"the desired document cannot be read: {error.what}")
        return self.take(document)

    def take(self, document: Any) -> Outcome:
        """Put a desired document `{ver, config}` in force, or say why not. Never raises for what it holds.

        `config` is nested like the file, or has dotted names. An unknown field or a wrong value refuses the whole; a
        field that needs a restart is left out and told.
        """
        with self._lock:
            try:
                wish = _Document.model_validate(document)
            except ValidationError as error:
                return self._refused("the desired document is wrong", refusals(error))
            if wish.ver <= self._applied:
                return Outcome(f"version {wish.ver} is not newer than {self._applied}, which was applied")
            found = sort_out(self._file, flat(wish.config))
            if found.wrong:
                return self._refused(f"version {wish.ver} is wrong, and nothing of it was applied", found.wrong)
            commands = {name: value for name, value in self._commands.items() if name not in found.live}
            try:
                told = self._put(self._file, found.live, commands)
            except EdgeAdaptError as error:
                why = (Refusal("config", f"{error.what}; {error.remedy}"),)
                return self._refused(f"version {wish.ver} could not be applied", why)
            self._applied, self._rejected = wish.ver, found.needs_restart
            self._version += 1
            self._save()
            return Outcome(f"version {wish.ver} was applied", True, tuple(told), found.needs_restart)

    def set(self, config: Mapping[str, Any], *, dry_run: bool = False) -> list[Change]:
        """Change live fields (dotted name -> value) until the restart; returns the differences.

        Raises: ConfigError if one is unknown or wrong or belongs to the desired document; nothing changed then.
        """
        with self._lock:
            taken = sorted(config.keys() & self._wished.keys())
            if taken:
                raise ConfigError(
                    f"{taken[0]} is set by version {self._applied} of the desired document",
                    remedy="change it there: a field has one owner",
                )
            found = sort_out(self._file, config)
            if found.wrong or found.needs_restart:
                raise Unfit(found.wrong + found.needs_restart)
            commands = {**self._commands, **found.live}
            if dry_run:
                return changes(self._settings, merged(self._file, {**self._wished, **commands}))
            told = self._put(self._file, self._wished, commands)
            self._version += bool(told)
            return told

    def rebase(self, settings: AgentSettings) -> list[Change]:
        """Take a file that was read again; returns how the files differ, also in what keeps its value until a restart.

        Raises: EdgeAdaptError if it cannot be applied; nothing changed then.
        """
        with self._lock:
            live = live_fields(type(settings))
            differences = [replace(one, live=one.path in live) for one in changes(self._file, settings)]
            file = merged(self._file, {one.path: one.new for one in differences if one.live})
            self._version += bool(self._put(file, self._wished, self._commands))
            return differences

    def reported(self, *, slots: Mapping[str, Any], versions: Mapping[str, Any]) -> dict[str, Any]:
        """The document to publish: what is in force, and what of the desired document is not."""
        with self._lock:
            return {
                "ver": self._version,
                "applied_desired_ver": self._applied,
                "config": self._settings.model_dump(mode="json"),
                "slots": dict(slots),
                "versions": dict(versions),
                "rejected": [{"field": one.field, "why": one.why} for one in self._rejected],
            }

    def _put(self, file: AgentSettings, wished: Mapping[str, Any], commands: Mapping[str, Any]) -> list[Change]:
        """Put the three layers in force; returns the differences. Raises: EdgeAdaptError, nothing changed then."""
        settings = merged(file, {**wished, **commands})
        told = changes(self._settings, settings)
        if told:
            self._apply(settings)
        self._file, self._wished, self._commands, self._settings = file, dict(wished), dict(commands), settings
        return told

    def _refused(self, text: str, why: tuple[Refusal, ...]) -> Outcome:
        if why != self._rejected:
            self._rejected = why
            self._version += 1
        return Outcome(text, rejected=why)

    def _load(self) -> _Saved:
        """What was saved; a damaged file is set aside, and the broker's retained document comes again anyway."""
        try:
            with self._path.open("rb") as file:
                return _Saved.model_validate_json(file.read(MOST_SAVED))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self.trouble = f"the document {self._path} cannot be read, and was set aside: {error}"
            aside = self._path.with_name(f"{self._path.name}.bad")
            try:
                self._path.replace(aside)
            except OSError:
                LOG.warning("%s cannot be set aside", self._path)
        return _Saved()

    def _save(self) -> None:
        """A disk that fails keeps nothing from being in force; after a restart the document is taken again."""
        saved = {"ver": self._applied, "config": self._wished, "reported_ver": self._version}
        try:
            write_atomically(self._path, json.dumps(saved).encode())
            self.trouble = None
        except OSError as error:
            self.trouble = f"the desired document cannot be written to {self._path}: {error}"
