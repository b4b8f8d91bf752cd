"""A bounded queue between two threads that says who gives way when it is full."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, Literal, TypeVar

T = TypeVar("T")
Policy = Literal["newest", "oldest", "block"]


class Ring(Generic[T]):
    """Holds at most `size` items, first in, first out.

    When it is full, `newest` drops the item that waited longest, `oldest` drops the one that comes, and `block` lets
    whoever puts wait. Closed, it takes nothing more and gives out what is left.
    """

    def __init__(self, size: int, policy: Policy = "newest") -> None:
        self.size, self.policy = size, policy
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def dropped(self) -> int:
        """Items that gave way so far."""
        return self._dropped

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, item: T, timeout_s: float = 0.0) -> bool:
        """Hand in an item; True if it is in. Only `block` waits, and may be asked again: that counts no drop."""
        with self._changed:
            if self.policy == "block":
                self._changed.wait_for(lambda: self._closed or len(self._items) < self.size, timeout_s)
            if self._closed:
                return False
            if len(self._items) >= self.size:
                if self.policy == "block":
                    return False
                self._dropped += 1
                if self.policy == "oldest":
                    return False
                self._items.popleft()
            self._items.append(item)
            self._changed.notify_all()
            return True

    def take(self, most: int = 1, timeout_s: float = 0.0) -> list[T]:
        """Up to `most` items, the oldest first. Waits for the first one alone; empty if none came, or if closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._items, timeout_s)
            taken = [self._items.popleft() for _ in range(min(most, len(self._items)))]
            if taken:
                self._changed.notify_all()
            return taken

    def close(self) -> None:
        """No more items. Wakes everybody who waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
