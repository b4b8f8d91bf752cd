"""Commands: taken from the network, checked, written down, carried out one at a time, and answered.

Three threads. The clerk looks at what came in, and tells what it refuses and what it accepts, at once. The worker
carries out; what has to wait for another machine, such as a download, has a worker of its own. The network's own thread
only leaves letters, and every queue between them has an end.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from device_agents.answers import Answers, Reply
from device_agents.control import Control
from device_agents.envelope import Clock, new_ulid
from device_agents.ledger import Entry, Ledger, State
from device_agents.pacing import Bucket, Suppressed
from device_agents.request import Address, Letter, Limits, Refused, Rejection, Request, checked, read
from device_agents.topics import Topics
from edge_adapt.errors import ConfigError, EdgeAdaptError, StateError

if TYPE_CHECKING:
    from device_agents.mqtt import Incoming

LOG = logging.getLogger(__name__)
TICK_S = 0.25
"""How often the clerk looks up when nothing comes."""
AUDITED, UNWRITTEN = 512, 256
"""Characters of arguments kept for the audit; commands that may be known in memory only."""
FLOOD = "flood"
Waiting = queue.Queue[tuple[Request, Future[dict[str, Any]]]]


class Commands:
    """`receive` is for the network, `submit_local` for buttons and signals; `execute` makes this a `Control` too.

    `reply` sends an answer, and must not wait for a network.
    """

    def __init__(
        self,
        control: Control,
        ledger: Ledger,
        topics: Topics,
        reply: Callable[[Reply], None],
        *,
        clock: Clock,
        limits: Limits | None = None,
    ) -> None:
        self._control, self._ledger, self._topics, self._clock = control, ledger, topics, clock
        self.limits = limits or Limits()
        self._answers = Answers(reply, clock, jitter_s=self.limits.jitter_s, salt=topics.root)
        self._door = threading.Lock()
        self._bucket = Bucket(self.limits.rate, self.limits.burst)
        self._suppressed = Suppressed(calm_ms=1000, most_ms=1000)
        self._counts: Counter[str] = Counter()
        self._inbox: queue.Queue[Letter] = queue.Queue(self.limits.inbox)
        self._gate = threading.Lock()
        """Held to decide about one command, so that two cannot both find the place free."""
        self._waiting: Waiting = queue.Queue(self.limits.queue)
        self._slow: Waiting = queue.Queue(1)  # slow ones are heavy, and of those one at a time is accepted
        self._heavy: str | None = None
        self._running: dict[str, str] = {}
        self._unwritten: OrderedDict[str, Entry] = OrderedDict()
        self._stopping = threading.Event()
        workers = [partial(self._worker, waiting) for waiting in (self._waiting, self._slow)]
        self._threads = [
            threading.Thread(target=self._loop, args=(step,), name=f"commands-{name}", daemon=True)
            for name, step in zip(("clerk", "worker", "slow"), (self._clerk, *workers), strict=True)
        ]

    @property
    def counts(self) -> dict[str, int]:
        """What happened, by name: received, retained, foreign, suppressed, accepted, done, failed, repeated, rejected
        and `rejected:<code>`, lost, unsent."""
        with self._door:
            return {**self._counts, "unsent": self._answers.unsent}

    @property
    def running(self) -> tuple[str, ...]:
        """The verbs that are being carried out: one at most, and a slow one."""
        return tuple(self._running.values())

    def start(self) -> None:
        """Tell what a restart interrupted, and begin."""
        for entry in self._ledger.interrupted():
            if entry.reply_to and entry.reply is not None:
                self._answers.give(Address(entry.reply_to, entry.correlation), entry.reply)
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End: what runs may finish, what waits is told that it will not. False if something still runs."""
        deadline = time.monotonic() + timeout_s
        with self._gate:
            self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        for waiting in (self._waiting, self._slow):
            while (found := _next(waiting)) is not None:
                self._finish(found[0], found[1], "failed", "stopping", "the agent stops: it did not begin")
        self._answers.send_due(math.inf)
        return not any(thread.is_alive() for thread in self._threads)

    def receive(self, incoming: Incoming) -> None:
        """Take a command from the network. Returns at once; never raises for what it holds."""
        now = self._clock.mono_ms()
        with self._door:
            self._counts["received"] += 1
            if incoming.retain:
                self._counts["retained"] += 1
                return
            if not self._bucket.take(now):
                self._suppress(now)
                return
        try:
            self._inbox.put_nowait(Letter.of(incoming, now, self.limits))
        except queue.Full:
            with self._door:
                self._suppress(now)

    def submit_local(
        self, verb: str, arguments: Mapping[str, Any], by: str, reason: str = "asked on the device"
    ) -> dict[str, Any]:
        """Carry out a command of this machine, with the same checks, the same busy rule and the same audit.

        Args:
            by: such as `page` or `signal`, for the audit.
        Returns: the reply: `status` done, failed or rejected; accepted if it still runs after `limits.local_s`.
        """
        outcome: Future[dict[str, Any]] = Future()
        key = f"local-{new_ulid(self._clock)}"
        try:
            found, parsed = checked(verb, arguments, reason.strip())
        except Refused as refused:
            return self._reject(Rejection(refused.code, str(refused), verb, key, Address("")))
        told = self._decide(Request(found, parsed, key, by, reason, Address("")), outcome)
        if told["status"] != "accepted":
            return told
        try:
            return outcome.result(self.limits.local_s)
        except NotYet:
            return told

    def execute(self, verb: str, arguments: Mapping[str, Any], *, by: str) -> dict[str, Any]:
        """`submit_local` as a `Control`: its result. Raises: ConfigError if it is rejected, StateError if it fails."""
        told = self.submit_local(verb, arguments, by)
        if told["status"] == "rejected":
            raise ConfigError(f"{verb} is refused ({told['code']}): {told['text']}", remedy="ask for something else")
        if told["status"] == "failed":
            raise StateError(f"{verb} failed ({told['code']}): {told['text']}", remedy="look at the events")
        return dict(told.get("result") or {})

    def pump(self) -> None:
        """Do everything that waits, in the caller's thread: for tools and tests that start none."""
        while self._clerk(0.0):
            pass
        while self._worker(self._waiting, 0.0) or self._worker(self._slow, 0.0):
            pass
        self._answers.send_due(self._clock.mono_ms())

    # The clerk.

    def _clerk(self, wait_s: float) -> bool:
        """One letter; False if none came."""
        letter = _next(self._inbox, wait_s)
        if letter is not None:
            found = read(letter, self._topics, self.limits, self._clock)
            if isinstance(found, Request):
                self._decide(found, Future())
            elif found is not None:
                self._reject(found)
            else:
                self._count("foreign")
        self._note_flood()
        self._answers.send_due(self._clock.mono_ms())
        return letter is not None

    def _decide(self, request: Request, outcome: Future[dict[str, Any]]) -> dict[str, Any]:
        """Answer what is known, accept what may run, refuse the rest. Returns what was answered."""
        with self._gate:
            try:
                known = self._unwritten.get(request.key) or self._ledger.find(request.key)
            except StateError:
                known = None  # writing it down will fail too, and say so
            if known is not None:
                return self._repeat(request, known)
            refused = self._refusal(request)
            if refused is not None:
                return self._reject(refused, request)
            if not self._written(request, "accepted", None):
                return self._reject(_rejection(request, "ledger", "it cannot be written down: is the disk full?"))
            if request.verb.heavy:
                self._heavy = request.key
            self._count("accepted")
            told = _told(request, "accepted", "accepted", "")
            self._answers.give(request.address, told)
            (self._slow if request.verb.slow else self._waiting).put_nowait((request, outcome))
            return told

    def _refusal(self, request: Request) -> Rejection | None:
        """Why it may not run now; None: it may."""
        now = self._clock.mono_ms()
        if request.deadline_ms is not None and now >= request.deadline_ms:
            return _rejection(request, "expired", "it came too late")
        if self._stopping.is_set():
            return _rejection(request, "stopping", "the agent stops")
        if request.verb.heavy and self._heavy is not None:
            return _rejection(request, "busy", "another command of this weight is under way: ask again, with a new id")
        if self._waiting.full():
            return _rejection(request, "busy", f"{self.limits.queue} commands wait already: ask again, with a new id")
        if self._ledger.set_aside is not None and not (request.local or request.verb.repeatable):
            left_s = self.limits.expiry_s - (now - self._ledger.set_aside_ms) / 1000
            if left_s > 0:
                text = f"the command ledger was damaged: for {left_s:.0f} s, what may not run twice is not taken"
                return _rejection(request, "ledger", text)
        return None

    def _written(self, request: Request, state: State, reply: Mapping[str, Any] | None) -> bool:
        """Write it down; False if that fails and it might therefore run twice."""
        risky = request.risky
        entry = Entry(
            key=request.key,
            verb=request.verb.name,
            digest=request.digest,
            arguments=request.written[:AUDITED] if risky else "",
            by=request.by,
            reason=request.reason,
            danger=risky,
            at_ms=self._clock.wall_ms(),
            reply_to=request.address.topic,
            correlation=request.address.correlation,
            state=state,
            reply=reply,
        )
        try:
            self._ledger.accept(entry, durable=request.lasting)
        except StateError:
            if not (request.local or request.verb.repeatable):
                return False
            self._unwritten[request.key] = entry
            if len(self._unwritten) > UNWRITTEN:
                self._unwritten.popitem(last=False)
        return True

    def _repeat(self, request: Request, known: Entry) -> dict[str, Any]:
        """A command seen before: what was answered then, and nothing else."""
        if known.digest != request.digest:
            return self._reject(_rejection(request, "key-reused", f"its id was used for another {known.verb}"))
        self._count("repeated")
        told = dict(known.reply or _told(request, "accepted", "accepted", "it is under way"))
        self._answers.give(request.address, told)
        return told

    def _reject(self, rejection: Rejection, request: Request | None = None) -> dict[str, Any]:
        """request: one that would have been right at another moment: its id is spent all the same."""
        told = {
            "id": rejection.key,
            "verb": rejection.verb,
            "status": "rejected",
            "code": rejection.code,
            "text": rejection.text,
        }
        if request is not None:
            self._written(request, "rejected", told)
        self._count("rejected")
        self._count(f"rejected:{rejection.code}")
        self._answers.give(rejection.address, told)
        return told

    # The workers.

    def _worker(self, waiting: Waiting, wait_s: float) -> bool:
        """One command; False if none waits."""
        found = _next(waiting, wait_s)
        if found is None:
            return False
        request, outcome = found
        self._running[request.key] = request.verb.name
        try:
            self._carry_out(request, outcome)
        finally:
            del self._running[request.key]
        return True

    def _carry_out(self, request: Request, outcome: Future[dict[str, Any]]) -> None:
        began = self._clock.mono_ms()
        if request.deadline_ms is not None and began >= request.deadline_ms:
            self._finish(request, outcome, "rejected", "expired", "it had to wait for others until it was too late")
            return
        try:
            self._ledger.begin(request.key)
        except StateError as error:
            LOG.warning("%s", error)
        try:
            arguments = request.arguments.model_dump()
            result = self._control.execute(request.verb.name, arguments, by=request.by)
        except EdgeAdaptError as error:
            code = type(error).__name__.removesuffix("Error").lower()
            self._finish(request, outcome, "failed", code, f"{error.what}; {error.remedy}", began)
        except Exception as error:
            LOG.exception("the command %s failed", request.verb.name)
            self._finish(request, outcome, "failed", "internal", f"{type(error).__name__} inside the agent", began)
        else:
            self._finish(request, outcome, "done", "ok", "", began, result)

    def _finish(
        self,
        request: Request,
        outcome: Future[dict[str, Any]],
        state: State,
        code: str,
        text: str,
        began_ms: int | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the outcome down, make room for the next heavy command, and answer."""
        told = _told(request, state, code, text[: self.limits.result])
        if began_ms is not None:
            told["duration_ms"] = self._clock.mono_ms() - began_ms
        if result:
            told["result"] = self._fitting(result)
        try:
            self._ledger.finish(request.key, state, told, durable=request.lasting)
        except StateError as error:
            LOG.warning("%s", error)
        with self._gate:
            if request.key in self._unwritten:
                self._unwritten[request.key] = replace(self._unwritten[request.key], state=state, reply=told)
            if self._heavy == request.key:
                self._heavy = None
        self._count(state)
        self._answers.give(request.address, told)
        outcome.set_result(told)

    def _fitting(self, result: Mapping[str, Any]) -> Any:
        """A result as JSON has it, or a note in its place if it is none or too large."""
        try:
            text = json.dumps(result, default=str, allow_nan=False)
        except (TypeError, ValueError):
            return {"left_out": "it cannot be written as JSON"}
        return json.loads(text) if len(text) <= self.limits.result else {"left_out": f"it has {len(text)} bytes"}

    # Both.

    def _loop(self, step: Callable[[float], bool]) -> None:
        """One of the threads. An error in one command ends that command, not the thread."""
        while not self._stopping.is_set():
            try:
                step(TICK_S)
            except Exception:
                LOG.exception("a command could not be handled")
                self._count("lost")

    def _suppress(self, now: int) -> None:
        """Under the door's lock."""
        self._counts["suppressed"] += 1
        self._suppressed.add("cmd", now)

    def _note_flood(self) -> None:
        """At most once a second: how many commands nobody looked at."""
        with self._door:
            count = sum(self._suppressed.due(self._clock.mono_ms()).values())
        if count:
            text = f"{count} commands were not looked at: more than {self.limits.rate:g} a second came"
            told = {"status": "suppressed", "count": count, "text": text}
            self._answers.hand_over(Reply(self._topics.ack(FLOOD), told))

    def _count(self, name: str) -> None:
        with self._door:
            self._counts[name] += 1


def _told(request: Request, status: State, code: str, text: str) -> dict[str, Any]:
    return {"id": request.key, "verb": request.verb.name, "status": status, "code": code, "text": text}


def _rejection(request: Request, code: str, text: str) -> Rejection:
    return Rejection(code, text, request.verb.name, request.key, request.address)


def _next(waiting: queue.Queue[Any], wait_s: float = 0.0) -> Any:
    """The next one; None if none comes in time."""
    try:
        return waiting.get(timeout=wait_s) if wait_s else waiting.get_nowait()
    except queue.Empty:
        return None
