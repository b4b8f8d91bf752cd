"""Fuzz: generated payloads over every topic that an agent listens to. Nothing raises, what is wrong changes nothing and
is refused by name, and what comes twice runs once. `make fuzz` runs it.
"""

from __future__ import annotations

import io
import json
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command_bench import ARGUMENTS, GROUP, TOPICS, Bench
from mutations import Payloads
from PIL import Image
from spent import spending

from device_agents.board import Board
from device_agents.connecting import Rival
from device_agents.desired import Desired
from device_agents.homeassistant import STATUS_TOPIC
from device_agents.mqtt import Incoming
from device_agents.network import Network
from device_agents.settings import AgentSettings
from device_agents.transfer import Transfers, chunks, offer_of
from device_agents.verbs import VERBS
from edge_adapt.errors import EdgeAdaptError
from edge_adapt.streams.live.pushed import PushedSource

CODES = frozenset(
    (
        *("bad-arguments", "bad-header", "bad-key", "busy", "clock", "expired", "far-expiry", "key-reused"),
        *("malformed", "no-expiry", "no-key", "no-reason", "reply-topic", "too-large", "unknown-verb"),
    )
)
IMAGES, BOOT = "cameras/hall/1", "b0000001"
EFFECTS = ("done", "applied", "taken", "frame", "told anew")
"""Outcomes of payloads that are obeyed."""
RESTART_EVERY = 500
TARGETS = {"command": 46, "group": 10, "desired": 18, "transfer": 14, "image": 8, "birth": 3, "status": 1}
"""What is fuzzed, and how often of a hundred."""


@dataclass
class Result:
    """What came of each payload."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(target, outcome) -> times."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest_ms: float = 0.0
    """CPU time of the refused payload that took most, without what collecting garbage takes."""

    @property
    def count(self) -> int:
        return sum(self.outcomes.values())

    def table(self) -> str:
        lines = [f"{'target':<12}{'outcome':<44}{'payloads':>9}"]
        for (target, outcome), times in sorted(self.outcomes.items()):
            lines.append(f"{target:<12}{outcome:<44}{times:>9}")
        rate = self.count / max(self.seconds, 1e-9)
        lines.append(
            f"{self.count} payloads in {self.seconds:.1f} s, {rate:.0f} a second; "
            f"the slowest refusal took {self.slowest_ms:.1f} ms of CPU; {len(self.failures)} failures"
        )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return {
            "payloads": self.count,
            "seconds": round(self.seconds, 1),
            "slowest_cpu_ms": round(self.slowest_ms, 1),
            "failures": len(self.failures),
            "outcomes": {f"{target}: {outcome}": times for (target, outcome), times in sorted(self.outcomes.items())},
        }


class Said:
    """In place of the courier: what the network would tell the broker."""

    def __init__(self) -> None:
        self.acks: list[Mapping[str, Any]] = []
        self.values = 0

    def latest(self, topic: str, data: Mapping[str, Any] | None, *, plain: bool = False) -> None:
        self.values += 1

    def ack(self, topic: str, data: Mapping[str, Any], correlation: bytes | None = None) -> None:
        self.acks.append(data)


class Agent:
    """Everything that reads what comes in, behind the agent's own router, with a control that only writes down."""

    def __init__(self, folder: Path) -> None:
        self.bench, self._inbox, self._wished = Bench(folder), folder / "inbox", folder / "desired.json"
        self.images = PushedSource(IMAGES, clock=lambda: 0.0)
        self.images.open()
        self.settings = AgentSettings.model_validate(
            {
                "bundle": "b",
                "source": {"kind": "mqtt", "topic": IMAGES},
                "mqtt": {},
                "telemetry": {"home_assistant": True},
            }
        )
        self.network = Network(
            self.settings, TOPICS, Board(), self.bench.clock, boot=BOOT, folder=folder / "link", about=dict
        )
        self.network.courier.stop()  # closes what it opened; it never ran
        self._told: list[tuple[str, str]] = []
        """Events: severity and text."""
        self.restart()

    def restart(self) -> None:
        """From what lies on disk; but a version from the end of all numbers, once applied, would end the game."""
        self.bench.restart()
        self._wished.unlink(missing_ok=True)
        self.desired = Desired(self.settings, lambda settings: None, path=self._wished)
        self.transfers = Transfers(self._inbox, expiry_s=1.0, clock=lambda: self.bench.clock.mono / 1000)
        self.rival = Rival(BOOT)
        self.network.connect(self.bench.commands, self.desired, self.transfers, self.images, self._tell)

    def take(self, incoming: Incoming) -> str:
        """Let the agent have a message; the outcome in a word or two."""
        if incoming.topic == TOPICS.birth:  # the courier keeps this one to itself
            return self._birth(incoming.payload)
        self._told.clear()
        said = self.network.courier = Said()
        before = self.bench.commands.counts
        self.network._came(incoming)
        if incoming.topic == IMAGES:
            return self._image()
        if incoming.topic == STATUS_TOPIC:
            return "told anew" if said.values else "passed over"
        place = TOPICS.parse(incoming.topic)
        if place is not None and place.kind == "cmd":
            return self._command(incoming, before)
        if place is not None and place.kind == "desired":
            return self._wish(incoming.payload)
        if place is not None and place.kind == "xfer":
            problem = said.acks[0]["problem"] if said.acks else None
            return "taken" if problem is None else _generic(problem)
        assert not (said.acks or said.values or self._told), "a topic that is none of ours was answered"
        return "none of ours"

    @property
    def state(self) -> tuple[Any, ...]:
        """Changes with whatever a payload may change."""
        parts = sorted((path.name, path.stat().st_mtime_ns) for path in self._inbox.glob("*"))
        return (len(self.bench.control.asked), self.desired.applied_version, self.desired.settings, parts)

    def _command(self, incoming: Incoming, before: Mapping[str, int]) -> str:
        self.bench.replies.clear()
        self.bench.commands.pump()
        self.bench.clock.turn(6)  # answers to groups are due
        self.bench.commands.pump()
        for name in ("retained", "foreign", "repeated"):
            if self.bench.commands.counts.get(name, 0) > before.get(name, 0):
                return name
        told = [reply.data for reply in self.bench.replies]
        last = told[-1]
        if last["status"] == "rejected":
            assert last["code"] in CODES, f"a rejection with an unknown name: {last}"
            assert 0 < len(last["text"].strip()) < 1500, f"a rejection that says nothing, or too much: {last}"
            return str(last["code"])
        assert [one["status"] for one in told] == ["accepted", "done"], told
        assert _plausible(incoming), f"accepted: {incoming}"
        return "done"

    def _wish(self, payload: bytes) -> str:
        if not payload:
            return "no document"
        ((severity, text),) = self._told
        return "applied" if severity == "info" else _generic(text.removeprefix("desired: "))

    def _birth(self, payload: bytes) -> str:
        """Another agent of our name shows in our own birth document, and nothing else does."""
        rival = self.rival.met(payload, first_connection=False)
        if rival is None:
            return "passed over"
        assert isinstance(rival, str) and rival == json.loads(payload)["boot"] != BOOT
        return "a rival"

    def _image(self) -> str:
        try:
            frame = self.images.read(0.0)
        except EdgeAdaptError as error:
            return type(error).__name__
        assert frame is not None and frame.image.ndim in (2, 3)
        return "frame"

    def _tell(self, kind: str, text: str, severity: str = "info", **facts: Any) -> None:
        assert kind == "state" and text
        json.dumps(facts)
        self._told.append((severity, text))


def _generic(text: str) -> str:
    """A reason without the figures and names of the single case."""
    for known in (
        *("no JSON", "bytes, more than", "nested deeper", "not an object", "speaks v", "lone surrogate", "half a char"),
        *("beyond what JSON", "not newer", "nothing of it was applied", "document is wrong", "the offer is wrong"),
        *("there is no transfer", "transfers are open", "none of 1 to", "expected", "cannot be kept"),
    ):
        if known in text:
            return known
    return text[:40]


def _plausible(incoming: Incoming) -> bool:
    """A second opinion on what was carried out, written down apart from the code that decides."""
    body = json.loads(incoming.payload)
    levels = incoming.topic.split("/")
    expires = incoming.expiry_s if incoming.expiry_s is not None else body.get("expires_ms")
    keys = [value for name, value in incoming.properties if name == "idem"] or [body.get("id")]
    return (
        not incoming.retain
        and body["v"] == 1
        and isinstance(body.get("d", {}), dict)
        and set(body.get("d", {})) <= set(ARGUMENTS[levels[-1]])
        and levels[-2] == "cmd"
        and levels[-1] in VERBS
        and bool(expires)
        and isinstance(keys[-1], str)
        and ".." not in str(body.get("d", {}).get("file"))
    )


class Source:
    """Draws payloads for one target after another."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.payloads = rng, Payloads(rng)
        self._sent: list[Incoming] = []
        self._number = self._version = 0
        self._package = rng.randbytes(4000)
        self._offer = offer_of(self._package, 512)
        self._chunks = dict(chunks(self._package, self._offer))
        self._pictures = [_picture(kind) for kind in ("PNG", "JPEG")]

    def draw(self, now_ms: int, version: int) -> tuple[str, Incoming]:
        """now_ms: wall clock, for commands that say in their body when they expire. version: the next desired one."""
        (target,) = self.rng.choices(list(TARGETS), TARGETS.values())
        self._number, self._version = self._number + 1, version
        make: Callable[[int], Incoming] = getattr(self, f"_{target}")
        if target in ("command", "group") and self._sent and self.rng.random() < 0.03:
            return target, self.rng.choice(self._sent)
        incoming = make(now_ms)
        if target in ("command", "group"):
            self._sent = [*self._sent[-200:], incoming]
        return target, incoming

    def _command(self, now_ms: int, start: str = f"{TOPICS.root}/cmd/") -> Incoming:
        rng, verb = self.rng, self.rng.choice(list(VERBS))
        body = {"v": 1, "d": ARGUMENTS[verb]}
        sound = Incoming(
            f"{start}{verb}", b"", expiry_s=60, properties=(("idem", f"k{self._number}"), ("reason", "a test"))
        )
        if rng.random() < 0.4:  # as MQTT 3.1.1 has it
            body |= {"id": f"k{self._number}", "by": "bob", "reason": "a test", "expires_ms": now_ms + 60_000}
            body["reply_to"] = f"{TOPICS.root}/reply/desk"
            sound = replace(sound, expiry_s=None, properties=())
        return self.payloads.odd_message(replace(sound, payload=self.payloads.odd_json(body)))

    def _group(self, now_ms: int) -> Incoming:
        return self._command(now_ms, GROUP)

    def _desired(self, now_ms: int) -> Incoming:
        rng = self.rng
        config = {
            "mode": rng.choice(("shadow", "recommend", "bounded_auto")),
            "budget": {"learn_ms_per_s": rng.uniform(1, 500), "memory_mb": None},
            "telemetry": {"interval_s": rng.uniform(1, 60)},
            "log_level": "info",
        }
        body = {"v": 1, "d": {"ver": self._version, "config": config}}
        return Incoming(TOPICS.desired, self.payloads.odd_json(body), retain=True)

    def _transfer(self, now_ms: int) -> Incoming:
        rng, id_ = self.rng, self.rng.choice(("a", "b", "c", "d", "e"))
        if rng.random() < 0.3:
            return Incoming(TOPICS.xfer(id_, 0), self.payloads.odd_json(self._offer.model_dump()))
        number = rng.choice([*self._chunks, len(self._chunks) + 1, 10**9, 10**60])
        data = self._chunks.get(number, b"x")
        return Incoming(TOPICS.xfer(id_, number), data if rng.random() < 0.5 else self.payloads.odd_bytes(data))

    def _birth(self, now_ms: int) -> Incoming:
        boot, id_ = self.rng.choice((BOOT, "a0000000", "c0000000")), f"01J{self._number % 9}"
        body = {"v": 1, "boot": boot, "id": id_, "d": {"s": "ready"}}
        return Incoming(TOPICS.birth, self.payloads.odd_json(body), retain=True)

    def _status(self, now_ms: int) -> Incoming:
        data = self.rng.choice((b"online", b"offline"))
        return Incoming(STATUS_TOPIC, data if self.rng.random() < 0.3 else self.payloads.odd_bytes(data))

    def _image(self, now_ms: int) -> Incoming:
        return Incoming(IMAGES, self.payloads.odd_bytes(self.rng.choice(self._pictures)))


def _picture(kind: str) -> bytes:
    made = io.BytesIO()
    Image.frombytes("RGB", (12, 9), bytes(range(12 * 9)) * 3).save(made, kind)
    return made.getvalue()


def fuzz(count: int, seed: int, folder: Path) -> Result:
    """count: payloads. seed: same seed, same payloads. folder: for the ledger and the transfers."""
    agent, source, result = Agent(folder), Source(random.Random(seed)), Result()
    began = time.monotonic()
    for number in range(count):
        if number % RESTART_EVERY == RESTART_EVERY - 1:
            agent.restart()
        target, incoming = source.draw(agent.bench.clock.wall, agent.desired.applied_version + 1)
        before = agent.state
        try:
            with spending() as spent:
                outcome = agent.take(incoming)
                changed = agent.state != before
            assert changed or outcome not in ("done", "applied"), f"{outcome}, but nothing changed"
            assert not changed or outcome in ("done", "applied", "taken"), f"{outcome}, but something changed"
        except Exception:
            outcome = "FAILED"
            result.failures.append(f"payload {number} of seed {seed}, {incoming!r:.600}\n{traceback.format_exc()}")
        if outcome not in EFFECTS:
            result.slowest_ms = max(result.slowest_ms, 1000 * spent.cpu_s)
        result.outcomes[target, outcome] += 1
    result.seconds = time.monotonic() - began
    agent.bench.close()
    return result
