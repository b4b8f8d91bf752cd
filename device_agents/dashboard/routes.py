"""What the page answers to. Needs the extra `dashboard`; everything that decides is in `guard` and `view`."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from device_agents.board import Board, Point
from device_agents.control import Control
from device_agents.dashboard import guard, view
from device_agents.dashboard.document import Document
from device_agents.dashboard.picture import png
from device_agents.metrics import CONTENT_TYPE, Metrics
from device_agents.verbs import VERBS
from edge_adapt.errors import ConfigError, EdgeAdaptError

T = TypeVar("T")
LOG = logging.getLogger(__name__)
BUTTONS = ("snapshot", "rollback", "reset", "freeze")
"""What the page may ask for. Everything else is for MQTT, where it has an author and a reason."""
TICK_S, HEARTBEAT_S, STALLED_S, BODY_S = 0.25, 5.0, 15.0, 5.0
COMMAND_S = 30.0
PICTURE_EVERY_S = 0.2
LISTENERS = 8
"""Pages that may be open at the same time."""


class Routes:
    """The routes, and the little they remember."""

    def __init__(self, board: Board, control: Control, *, bound: str, closing: threading.Event) -> None:
        self.board, self.control, self.closing = board, control, closing
        self.token = secrets.token_urlsafe(24)
        self.document = Document.load(token=self.token, instance=secrets.token_hex(8))
        self.metrics = Metrics(board)
        self.pictures = _Pictures(board)
        self.names, self.bound = guard.own_names(bound), bound
        self.listeners = 0
        self.busy = False

    def app(self) -> ASGIApp:
        """The application, inside what keeps strangers out."""
        routes = [
            Route("/", self.index),
            Route("/events", self.events),
            Route("/frame.png", self.frame),
            Route("/statez", self.statez),
            Route("/livez", self.livez),
            Route("/readyz", self.readyz),
            Route("/metrics", self.prometheus),
            Route("/command/{verb}", self.command, methods=["POST"]),
        ]
        return _Guarded(Starlette(routes=routes), self.names, self.bound)

    async def index(self, request: Request) -> Response:
        headers = {"content-security-policy": self.document.policy}
        return Response(self.document.html, media_type="text/html", headers=headers)

    async def statez(self, request: Request) -> Response:
        return Response(view.encode(view.statez(self.board)), media_type="application/json")

    async def livez(self, request: Request) -> Response:
        return JSONResponse({"alive": True})

    async def readyz(self, request: Request) -> Response:
        ready, why = view.readiness(self.board.status)
        return JSONResponse({"ready": ready, "why": why}, 200 if ready else 503)

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def frame(self, request: Request) -> Response:
        found = await self.pictures.latest()
        if found is None:
            return Response(status_code=204)
        data, point = found
        answer = json.dumps(view.plain(view.point_row(point)))  # ASCII, so that a header can hold it
        return Response(data, media_type="image/png", headers={"edge-adapt-answer": answer})

    async def events(self, request: Request) -> Response:
        if self.listeners >= LISTENERS:
            return refusal(503, f"{LISTENERS} pages are open already", "close one", {"retry-after": "5"})
        return _EventStream(self)

    async def command(self, request: Request) -> Response:
        """Carry out one button, and tell what came of it."""
        why = guard.command_refused(request.headers, self.token)
        if why is not None:
            return refusal(403, why, "use the buttons of the page")
        verb = request.path_params["verb"]
        if verb not in BUTTONS:
            return refusal(404, f"the page has no button {verb!r}", f"known: {', '.join(BUTTONS)}")
        try:
            body = await asyncio.wait_for(_body(request), BODY_S)
        except (asyncio.TimeoutError, ClientDisconnect):
            return refusal(408, f"the command did not arrive within {BODY_S:g} s", "send it again")
        if body is None:
            return refusal(413, f"a command has at most {guard.MOST_BODY} bytes", "send only its arguments")
        try:
            arguments = VERBS[verb].parse(json.loads(body or b"{}")).model_dump()
        except ConfigError as error:
            return refusal(422, error.what, error.remedy)
        except (ValueError, RecursionError):
            return refusal(422, "the arguments are no JSON", "use the buttons of the page")
        if self.busy:
            return refusal(409, "another command is being carried out", "wait for it")
        return await self._execute(verb, arguments)

    async def _execute(self, verb: str, arguments: Mapping[str, Any]) -> Response:
        self.busy = True

        def carry_out() -> dict[str, Any]:
            try:
                return self.control.execute(verb, arguments, by="page")
            finally:
                self.busy = False

        try:
            result = await asyncio.wait_for(in_thread(carry_out), COMMAND_S)
        except asyncio.TimeoutError:
            return refusal(504, f"{verb} gave no answer in {COMMAND_S:g} s", "look at the events: it may still happen")
        except EdgeAdaptError as error:
            return refusal(409, error.what, error.remedy)
        except Exception:
            LOG.exception("the button %s failed", verb)
            return refusal(500, f"{verb} failed inside the agent", "see its log")
        return Response(view.encode({"done": verb, "result": result}), media_type="application/json")


class _EventStream(Response):
    """Server-sent events for one page: what changed, four times a second at most, and a heartbeat when nothing does.

    Each page reads the board at its own pace: one that takes nothing holds up nobody, and is hung up on.
    """

    def __init__(self, routes: Routes) -> None:
        super().__init__(media_type="text/event-stream")
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.routes.listeners += 1
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await self._stream(send, gone)
        except (asyncio.TimeoutError, OSError):
            pass
        finally:
            gone.cancel()
            self.routes.listeners -= 1

    async def _stream(self, send: Send, gone: asyncio.Future[None]) -> None:
        headers = [
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _say(send, "hello", {"instance": self.routes.document.instance})
        read, said = view.Cursor(), time.monotonic()
        while not gone.done() and not self.routes.closing.is_set():
            message, read = view.news(self.routes.board, read)
            if message or time.monotonic() - said > HEARTBEAT_S:
                await _say(send, "news" if message else "beat", message)
                said = time.monotonic()
            await asyncio.sleep(TICK_S)
        await send({"type": "http.response.body", "body": b""})


class _Pictures:
    """The latest frame as PNG, encoded at most five times a second however many ask."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.kept: tuple[bytes, Point] | None = None
        self.made = 0.0
        self.lock = asyncio.Lock()

    async def latest(self) -> tuple[bytes, Point] | None:
        async with self.lock:
            found = self.board.latest
            if found is None:
                return None
            frame, point = found
            fresh = self.kept is not None and time.monotonic() - self.made < PICTURE_EVERY_S
            if not fresh and (self.kept is None or self.kept[1] is not point):
                data = await in_thread(lambda: png(frame))
                self.kept, self.made = None if data is None else (data, point), time.monotonic()
            return self.kept


class _Guarded:
    """Refuses requests for a foreign host, and says on every answer what a browser may do with it."""

    def __init__(self, app: ASGIApp, names: frozenset[str], bound: str) -> None:
        self.app, self.names, self.bound = app, names, bound

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                headers["cache-control"] = "no-store"
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
                headers["cross-origin-resource-policy"] = "same-origin"
                message["headers"] = headers.raw
            await send(message)

        why = guard.host_refused(Headers(scope=scope).get("host", ""), self.names, bound=self.bound)
        app = self.app if why is None else refusal(421, why, f"ask for {', '.join(sorted(self.names))}")
        await app(scope, receive, protected)


def refusal(status: int, what: str, remedy: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as the page shows it."""
    return JSONResponse({"error": what, "remedy": remedy}, status, headers=headers)


async def in_thread(work: Callable[[], T]) -> T:
    """Run it in a thread of its own that the end of the process need not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: Exception | None) -> None:
        if not future.done():
            future.set_exception(error) if error else future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except Exception as error:
            failed = error
        with suppress(RuntimeError):  # the page was stopped meanwhile
            loop.call_soon_threadsafe(deliver, result, failed)

    threading.Thread(target=run, name="page-work", daemon=True).start()
    return await future


async def _body(request: Request) -> bytes | None:
    """The body, or None if it is too large; nothing more than the limit is ever held."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > guard.MOST_BODY:
            return None
    return body


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _say(send: Send, kind: str, message: Mapping[str, Any]) -> None:
    body = b"event: " + kind.encode() + b"\ndata: " + view.encode(message) + b"\n\n"
    await asyncio.wait_for(send({"type": "http.response.body", "body": body, "more_body": True}), STALLED_S)
