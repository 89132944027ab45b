"""The outermost layer of the server, around an application that does nothing: who is told what when a request ends."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import threading

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from lowbit.hf.serve_guard import Guard
from lowbit.hf.serve_loop import run

SCOPE = {"type": "http", "headers": []}


class Connection:
    """A client that sends one request, and what was sent to it."""

    def __init__(self, *, leaves=False):
        self.sent, self.leaves, self.asked = [], leaves, False

    async def receive(self):
        if not self.asked:
            self.asked = True
            return {"type": "http.request", "body": b"{}", "more_body": False}
        if not self.leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)


async def _for_ever(scope, receive, send):
    await asyncio.Event().wait()


async def _half_an_answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await asyncio.Event().wait()


def _cut_short(app, connection):
    """Runs a request until nothing moves, then cancels it as uvicorn does when its patience at the end is over."""

    async def request():
        task = asyncio.ensure_future(Guard(app, 100)(dict(SCOPE), connection.receive, connection.send))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(request())


def test_a_request_that_the_servers_end_cuts_short_is_told_so():
    """Without an answer uvicorn would send 500, as if the request had been at fault."""
    connection = Connection()
    _cut_short(_for_ever, connection)
    start, body = connection.sent
    assert start["status"] == 503 and (b"connection", b"close") in start["headers"]
    assert json.loads(body["body"])["error"] == {
        "message": "the server is shutting down",
        "type": "server_error",
        "param": None,
        "code": None,
    }


def test_an_answer_that_has_begun_is_not_answered_again():
    connection = Connection()
    _cut_short(_half_an_answer, connection)
    assert [message["type"] for message in connection.sent] == ["http.response.start"]


def test_a_client_that_is_gone_is_told_nothing():
    connection = Connection(leaves=True)
    _cut_short(_for_ever, connection)
    assert connection.sent == []


# --- uvicorn around it


def test_a_connection_that_uvicorn_overlooks_at_the_end_is_closed_after_one_answer(monkeypatch):
    """Such as one that is being accepted when the signal comes. Nothing but its own answers can end it then."""

    async def app(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    answers = []

    def client():
        connection = http.client.HTTPConnection(*listener.getsockname(), timeout=30)
        signalled = False
        while not answers or answers[-1] != "close":
            connection.request("GET", "/")
            response = connection.getresponse()
            response.read()
            answers.append(response.getheader("connection"))
            if not signalled:
                os.kill(os.getpid(), signal.SIGTERM)
                signalled = True
        connection.close()

    monkeypatch.setattr(AutoHTTPProtocol, "shutdown", lambda self: None)
    asking = threading.Thread(target=client, daemon=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        assert run(app, listener, 20, "error", asking.start) == signal.SIGTERM
    asking.join(timeout=30)
    assert answers[0] is None and answers[-1] == "close"
