"""Talking to systemd: one datagram to the socket it names. Without systemd, nothing happens."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Tells systemd how the agent is. Never raises and never waits: a manager that went away must not hurt answers."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self.watchdog_interval_s = watchdog_interval_s(environment)

    @property
    def there(self) -> bool:
        """True if somebody is told."""
        return self._address is not None

    def ready(self, status: str = "") -> bool:
        """Started, or back after a reload."""
        return self._send("READY=1", *_status(status))

    def status(self, status: str) -> bool:
        """One line for `systemctl status`."""
        return self._send(*_status(status))

    def alive(self) -> bool:
        """Feed the watchdog."""
        return self._send("WATCHDOG=1")

    def reloading(self) -> bool:
        """A reload begins; `ready` ends it."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str = "") -> bool:
        """A graceful stop begins."""
        return self._send("STOPPING=1", *_status(status))

    def _send(self, *lines: str) -> bool:
        """True if the message was handed over."""
        if self._address is None:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except OSError:
            return False
        return True


def watchdog_interval_s(environment: Mapping[str, str] = os.environ) -> float | None:
    """Seconds after which systemd kills a silent agent; None if it does not watch. Feed it twice as often."""
    try:
        interval, pid = int(environment["WATCHDOG_USEC"]), int(environment.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    return interval / 1e6 if interval > 0 and pid == os.getpid() else None


def _address(name: str) -> str | None:
    """The address of a socket: a path, or an abstract name, which systemd writes with `@` for the zero byte."""
    if not name.startswith(("/", "@")):
        return None
    return "\0" + name[1:] if name.startswith("@") else name


def _status(text: str) -> list[str]:
    return [f"STATUS={' '.join(text.split())}"] if text else []
