"""What may be asked of a running agent: by a command over MQTT, by a button of the page, by a signal, by a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Control(Protocol):
    """Carried out by the agent, between two batches where it has to be; one call at a time, and a slow one beside."""

    def execute(self, verb: str, arguments: Mapping[str, Any], *, by: str) -> dict[str, Any]:
        """Do it, and return what to tell about it.

        Args:
            verb: one of `verbs.VERBS`; its arguments were checked against the schema there.
            by: who asked, for the audit.
        Raises: EdgeAdaptError if it cannot be done; nothing changed then.
        """
        ...
