"""Answers to commands on their way out: at once, or a while later where many devices were asked together."""

from __future__ import annotations

import heapq
import logging
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from device_agents.envelope import Clock
from device_agents.request import Address

LOG = logging.getLogger(__name__)
MOST_DELAYED = 256
"""More answers than that are not delayed, rather than kept."""


@dataclass(frozen=True)
class Reply:
    """What goes out about a command: `accepted`, then `done` or `failed`; or `rejected`; or `suppressed`, for many."""

    topic: str
    data: Mapping[str, Any]
    correlation: bytes | None = None


class Answers:
    """Thread-safe.

    Args:
        send: must not wait for a network; what it raises is logged and counted.
        jitter_s: answers to a group are delayed by a random part of this, the same for all answers to one command, so
            that they stay in order.
        salt: what makes this device draw other parts than its neighbours.
    """

    def __init__(self, send: Callable[[Reply], None], clock: Clock, *, jitter_s: float, salt: str) -> None:
        self._send, self._clock, self._jitter_s, self._salt = send, clock, jitter_s, salt
        self._lock = threading.Lock()
        self._delayed: list[tuple[float, int, Reply]] = []
        self._number = 0
        self.unsent = 0

    def give(self, address: Address, data: Mapping[str, Any]) -> None:
        """Send now or later. An address without a topic is somebody who waits for the outcome here: nothing is sent."""
        if not address.topic:
            return
        reply = Reply(address.topic, dict(data), address.correlation)
        if not address.in_group or not self._lay_aside(reply):
            self.hand_over(reply)

    def send_due(self, now_ms: float) -> None:
        """Send delayed answers whose time has come."""
        while True:
            with self._lock:
                if not self._delayed or self._delayed[0][0] > now_ms:
                    return
                reply = heapq.heappop(self._delayed)[2]
            self.hand_over(reply)

    def hand_over(self, reply: Reply) -> None:
        """Send now."""
        try:
            self._send(reply)
        except Exception:
            LOG.exception("an answer could not be handed over")
            with self._lock:
                self.unsent += 1

    def _lay_aside(self, reply: Reply) -> bool:
        part = random.Random(f"{self._salt} {reply.data.get('id')}").random()
        with self._lock:
            if len(self._delayed) >= MOST_DELAYED:
                return False
            self._number += 1
            due = self._clock.mono_ms() + 1000 * self._jitter_s * part
            heapq.heappush(self._delayed, (due, self._number, reply))
            return True
