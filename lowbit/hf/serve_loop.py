"""uvicorn around the application: ready when it listens, ended by a signal, with time for the requests that run."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from .serve_guard import App, Message, Receive, Send

__all__ = ["run"]


class Server(uvicorn.Server):
    """uvicorn's server, which would end the process with the signal; here that is the caller's business."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], stopped_by: list[int]) -> None:
        super().__init__(config)
        self.ready, self.stopped_by = ready, stopped_by

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets=sockets)
        self.ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the server while this is open; afterwards they mean what they did before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        caught = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop listening; a second SIGINT does not wait for the requests that run."""
        if not self.stopped_by:
            name, grace = signal.Signals(sig).name, self.config.timeout_graceful_shutdown
            print(f"lowbit serve: {name}: no new requests; those that run have {grace} s", file=sys.stderr, flush=True)
        self.stopped_by.append(sig)
        super().handle_exit(sig, frame)


def closing(app: App, ending: Callable[[], Any]) -> App:
    """``app``, whose answers close their connection once ``ending()`` is true.

    uvicorn closes the connections it knows of when it stops. One that is being accepted at that moment it would keep,
    and answer on it, request after request, until the grace is over.
    """

    async def closing_app(scope: Message, receive: Receive, send: Send) -> None:
        async def closing_send(message: Message) -> None:
            if message["type"] == "http.response.start" and ending():
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        await app(scope, receive, closing_send)

    return closing_app


def run(app: Any, listener: socket.socket, grace: int, log_level: str, ready: Callable[[], None]) -> int:
    """Answer requests until a signal.

    Args:
        app: an ASGI application.
        listener: a bound socket.
        grace: seconds the requests have that run when the signal comes.
        log_level: uvicorn's; from info on with a line per request.
        ready: called when connections are accepted.

    Returns:
        the signal.

    Raises:
        OSError: another process listens on the address by now.
    """
    stopped_by: list[int] = []
    config = uvicorn.Config(
        closing(app, lambda: stopped_by),
        log_level=log_level,
        access_log=log_level in ("debug", "info"),
        timeout_graceful_shutdown=grace,
        lifespan="on",
    )
    server = Server(config, ready, stopped_by)
    try:
        listener.listen(config.backlog)
    except OSError as error:
        raise OSError(f"cannot listen on {listener.getsockname()[:2]}: {error.strerror}") from error
    server.run(sockets=[listener])
    return stopped_by[0] if stopped_by else 0
