"""Odd payloads, made from sound ones: bytes bent, values swapped for strange ones, and JSON that grew wild."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

from device_agents.mqtt import Incoming

HUGE = b'{"v":1,"d":"' + b"x" * 10_000_000 + b'"}'
BOMBS = (
    *(b"[" * 8_000, b"[" * 100_000, b'{"v":1,"d":' + b'{"a":' * 2_000 + b"1" + b"}" * 2_001, HUGE),
    *(b'{"v":1,"d":' + b"9" * 5_000 + b"}", b'{"v":1,"d":{"x":1e999}}', b'{"v":1,"d":{"x":-NaN}}', b"\xff\xfe{}", b""),
    *(b'{"v":1,"v":1,"d":{},"d":{"x":1}}', b"\xef\xbb\xbf{}", b"null", b'"v"', b"1e5", b'{"v":1,"d":{"\\ud800":1}}'),
)
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, -0.0, 1e308, 2**31, 2**53 + 1, 10**30, "", " ", "x" * 300, [], {}, [[]], [{}]),
    *("../../etc/passwd", "/dev/null", "a/b", "..", "file:///etc/passwd", "https://x/y", "\x00", "a\nb", "\U0001f600"),
    *("+", "#", "$SYS/x", "ea/v1/hall/cam2/cmd/reset", "__class__", "%s%n", "'; DROP TABLE commands;--", "${HOME}"),
    *("true", "1", "NaN", "bounded_auto", ["x"] * 50, {"a": {"b": {"c": 1}}}, list(range(200)), {"x" * 200: 1}),
)
WORDS = (
    *("v", "d", "id", "by", "reason", "reply_to", "expires_ms", "ver", "config", "mode", "budget", "learn_ms_per_s"),
    *("on", "slot", "labels", "sha256", "file", "url", "size", "chunk"),
)
TOKENS = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\u0000", b"\\", b"null", b"-", b"e9"),
    *(b"\x00", b"\x80", b"\xc3\x28"),
)


class Payloads:
    """Draws; the caller owns the seed."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def odd_json(self, sound: Any) -> bytes:
        """A body as it is (a fifth), with some values swapped, bent as bytes, wild, or a bomb."""
        rng, way = self.rng, self.rng.random()
        if way < 0.2:
            return json.dumps(sound).encode()
        if way < 0.65:
            value = json.loads(json.dumps(sound))
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                value = self._swapped(value)
            return json.dumps(value).encode()
        if way < 0.88:
            return self.odd_bytes(json.dumps(sound).encode())
        if way < 0.96:
            return json.dumps({"v": 1, **self._wild_object(3)}).encode()
        return rng.choice(BOMBS)

    def odd_bytes(self, sound: bytes) -> bytes:
        """Flip, cut, repeat, insert; a few times."""
        rng, data = self.rng, bytearray(sound)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(data) + 1)
            way = rng.randrange(5)
            if way == 0 and at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            elif way == 1:
                del data[at : at + rng.choice((1, 3, 30, len(data)))]
            elif way == 2:
                data[at:at] = data[at : at + rng.choice((1, 8, 64))]
            elif way == 3:
                data[at:at] = rng.choice(TOKENS)
            else:
                data[at : at + 2] = rng.randbytes(2)
        return bytes(data)

    def odd_message(self, sound: Incoming) -> Incoming:
        """The parts of a message beside its payload; half of them stay as they are."""
        rng = self.rng
        if rng.random() < 0.5:
            return sound
        way = rng.randrange(7)
        if way == 0:
            return replace(sound, retain=True)
        if way == 1:
            return replace(sound, expiry_s=rng.choice((None, 0, 1, 300, 301, 2**32 - 1)))
        if way == 2:
            topics = (value for value in STRANGE if isinstance(value, str))
            return replace(sound, response_topic=rng.choice(["ea/v1/hall/_ctrl/desk/reply/1", *topics]))
        if way == 3:
            return replace(sound, correlation=rng.randbytes(rng.choice((0, 16, 256, 257, 5_000))))
        if way == 4:
            name = rng.choice(("idem", "by", "reason", "other"))
            odd = rng.choice([str(value) for value in STRANGE])
            return replace(sound, properties=(*sound.properties, (name, odd)) * rng.choice((1, 1, 20)))
        if way == 5:
            return replace(sound, properties=())
        return replace(sound, topic=self._odd_topic(sound.topic))

    def _odd_topic(self, topic: str) -> str:
        levels = topic.split("/")
        at = self.rng.randrange(len(levels))
        levels[at] = self.rng.choice([levels[at][:-1], levels[at] + "x", "", "..", "cam2", "ping", levels[at].upper()])
        return "/".join(levels)

    def _swapped(self, value: Any) -> Any:
        """One node somewhere replaced, left out, or joined by another one."""
        rng = self.rng
        if isinstance(value, dict) and value and rng.random() < 0.85:
            name = rng.choice(list(value))
            way = rng.random()
            if way < 0.6:
                return {**value, name: self._swapped(value[name])}
            if way < 0.75:
                return {other: inner for other, inner in value.items() if other != name}
            return {**value, rng.choice([*WORDS, name + "x", name[:-1]]): rng.choice(STRANGE)}
        if isinstance(value, list) and value and rng.random() < 0.7:
            at = rng.randrange(len(value))
            return [*value[:at], self._swapped(value[at]), *value[at + rng.randrange(2) :]]
        return rng.choice(STRANGE)

    def _wild_object(self, depth: int) -> dict[str, Any]:
        return {self.rng.choice(WORDS): self._wild(depth) for _ in range(self.rng.randrange(6))}

    def _wild(self, depth: int) -> Any:
        rng = self.rng
        if depth and rng.random() < 0.5:
            return self._wild_object(depth - 1)
        if depth and rng.random() < 0.2:
            return [self._wild(depth - 1) for _ in range(rng.randrange(5))]
        return rng.choice(STRANGE)
