"""Where a service listens, what serves there, and the signals that stop it."""

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from waterfall.errors import SettingsError


@contextlib.contextmanager
def listening(section: str, host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens where a section of the settings says.

    Raises:
        SettingsError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off: 40 ms a call otherwise.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                reason = f"{section}.port: {host}:{port} cannot be listened on: {error.strerror}; port 0 takes a free one"
            else:
                reason = f"{section}.host: {host} cannot be listened on: {error.strerror or error}"
            raise SettingsError(reason=reason) from None
        yield listener


def url_of(listener: socket.socket) -> str:
    """Where it listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves one application; signals are left to what surrounds it, which has more to put away."""

    def __init__(self, app: ASGIApp, listener: socket.socket, flush_seconds: int) -> None:
        """A server that gives requests under way so long to end when it stops."""
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # nothing depends on where a request comes from
                timeout_keep_alive=75,
                timeout_graceful_shutdown=flush_seconds,
            )
        )
        self._listener = listener

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["asyncio.Task[None]"]:
        """Serve until this is left.

        Raises:
            SettingsError: it stopped while it started.
        """
        serving = asyncio.create_task(self.serve(sockets=[self._listener]))
        try:
            while not self.started:
                if serving.done():
                    serving.result()
                    raise SettingsError(reason="the server stopped while it started")
                await asyncio.sleep(0.01)
            yield serving
            self.should_exit = True
            await serving
        finally:
            self.should_exit = True
            await ended(serving)


class Stop:
    """SIGINT and SIGTERM."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        """To stop."""
        self.asked_again = asyncio.Event()
        """To stop at once."""

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take the signals; afterwards none disturbs what is still put away."""

        def ask() -> None:
            (self.asked_again if self.asked.is_set() else self.asked).set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ask)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, lambda: None)


async def first(*events: "asyncio.Future[Any] | asyncio.Event | None") -> None:
    """Wait for the first of these; none of them is touched."""
    waits = [asyncio.ensure_future(one.wait()) for one in events if isinstance(one, asyncio.Event)]
    try:
        futures = [one for one in events if isinstance(one, asyncio.Future)]
        await asyncio.wait([*waits, *futures], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def ended(task: "asyncio.Task[None]") -> None:
    """Wait for a task to end, cancelled or not: what it works with may be put away only then."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
