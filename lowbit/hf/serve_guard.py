"""The outermost layer of the server: how large a request may be, and what happens when its client goes away.

An ASGI application around transformers'. It reads the whole body before anything else sees the request, so that a body
that is too large costs no more memory than is allowed. While the request is answered it watches the connection: the
generation ends when the client is gone, whether its answer is streamed or not.

ASGI: https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from .serve_generate import Job, current_job

__all__ = ["Guard", "error_body"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

DRAINED = 8
"""A body that is too large is read on, and thrown away, up to so many times the limit: a client that is still sending
does not look for an answer. Past that the connection is closed under it."""

DONE = b"data: [DONE]\n\n"
FAILED = b'data: {"error"'


def error_body(status: int, message: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object; clients show its message."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


class _Disconnected(Exception):
    pass


class _TooLarge(Exception):
    pass


class Guard:
    """Wraps ``app``; requests with a body of more than ``limit`` bytes are answered with 413."""

    def __init__(self, app: App, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request, or the server's start and end."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # transformers takes the client's x-request-id for its own name of the request: two clients must not share one.
        scope["headers"] = [header for header in scope["headers"] if header[0].lower() != b"x-request-id"]
        try:
            body = await self._body(dict(scope["headers"]), receive)
        except _Disconnected:
            return None
        except _TooLarge:
            return await _refuse(send, 413, f"the request's body is larger than {self.limit} bytes")
        await _Exchange(self.app, scope, body, receive, send).run()

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > DRAINED * self.limit:
            raise _TooLarge
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size <= self.limit:
                parts.append(part)
            elif size > DRAINED * self.limit:
                break
            else:
                parts.clear()
        if size > self.limit:
            raise _TooLarge
        return b"".join(parts)


class _Exchange:
    """One request whose body is read, and its answer."""

    def __init__(self, app: App, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send) -> None:
        self.app, self.scope = app, scope
        self.body: bytes | None = body
        self.from_client, self.to_client = receive, send
        self.gone = asyncio.Event()
        self.started = self.refused = self.complete = self.streaming = self.broken = False

    async def run(self) -> None:
        """Answer the request; returns when the answer is sent, or the client is gone and its generation cancelled."""
        job = Job()
        token = current_job.set(job)
        answer = asyncio.ensure_future(self.app(self.scope, self._receive, self._send))
        watch = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not self.complete:
                answer.cancel()  # nothing happens to it if it is done
            await answer
        except asyncio.CancelledError:
            # The client is gone, or the server ends and its patience is over: then uvicorn closes the connection.
            answer.cancel()
            with suppress(asyncio.CancelledError):  # asyncio's own end cancels every task once more
                if not (self.started or self.gone.is_set()):
                    self.started = self.refused = True
                    await _refuse(self.to_client, 503, "the server is shutting down")
                await asyncio.wait({answer})
        finally:
            watch.cancel()
            job.cancel()
            current_job.reset(token)

    async def _watch(self) -> None:
        while (await self.from_client())["type"] != "http.disconnect":
            pass
        self.gone.set()

    async def _receive(self) -> Message:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self.refused:
            return
        if message["type"] == "http.response.start":
            self.started = True
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self.streaming = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif message["type"] == "http.response.body":
            self.broken = self.broken or FAILED in message.get("body", b"")
            self.complete = not message.get("more_body", False)
            if self.complete and self.streaming and not self.broken:
                # OpenAI's streams end with this, transformers' just end: one could not tell them from broken ones.
                message = {**message, "body": message.get("body", b"") + DONE}
        await self.to_client(message)


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
