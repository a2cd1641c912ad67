"""HTTP to providers. What matters for money: whether a failed call can have reached the provider."""

import asyncio
import io
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import aiohttp
import structlog

from waterfall.errors import (
    AlreadyCharged,
    CallLost,
    HoldNotOpen,
    IdempotencyConflict,
    UnsupportedRoute,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamUnavailable,
    WaterfallError,
)
from waterfall.gateway.config import UpstreamSettings

log = structlog.get_logger()

# Idle connections are closed before the provider closes them: a request that meets a closing connection may or
# may not have been served.
_KEEPALIVE_SECONDS = 4
_CONNECTIONS = 1024
_LARGE_BYTES = 2**20
_ANTHROPIC_VERSION = "2023-06-01"
"""For callers that name none. Source: https://platform.claude.com/docs/en/api/versioning"""
_CLOSE_SECONDS = 1


class Upstream:
    """One provider."""

    def __init__(self, name: str, settings: UpstreamSettings) -> None:
        """A provider; its connections open with the first call, in the running event loop."""
        self.name = name
        self.settings = settings
        self._session: aiohttp.ClientSession | None = None
        self._limits: set[asyncio.Timeout] = set()
        self._is_cut = False

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **self._key()}
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=_CONNECTIONS, keepalive_timeout=_KEEPALIVE_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),  # one caller's cookies are not for the next
                headers=headers,
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    sock_connect=self.settings.connect_seconds,
                    sock_read=self.settings.timeout_seconds,
                ),
            )
        return self._session

    def _key(self) -> dict[str, str]:
        key = self.settings.api_key()
        if self.settings.kind == "anthropic":
            version = {"anthropic-version": _ANTHROPIC_VERSION}
            return version if key is None else version | {"x-api-key": key}
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    @asynccontextmanager
    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request, with these headers besides its own; the answer's status and headers are there, its body is still to be read.

        What aiohttp says of a failure names hosts and ports, so it is logged and not told to callers.

        Raises:
            UpstreamUnavailable: the provider cannot have seen the request.
            UpstreamTimeout, UpstreamInvalid: it may have, also while the body is read.
        """
        settings = self.settings
        url = settings.base_url.rstrip("/") + path
        end = asyncio.get_running_loop().time() + settings.max_call_seconds
        answered = False
        try:
            # aiohttp's own limits say nothing of an upstream that does not take the request in.
            first = min(settings.connect_seconds + 2 * settings.timeout_seconds, settings.max_call_seconds)
            async with (
                asyncio.timeout(first) as limit,
                self._may_be_cut(limit),
                # A redirect would let another server see the request and run it.
                self._open().post(
                    url, data=_payload(body), headers=headers, allow_redirects=False
                ) as response,
            ):
                answered = True
                if not self._is_cut:
                    limit.reschedule(end)
                yield response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as error:
            log.warning("upstream not reached", upstream=self.name, reason=_words_of(error))
            raise UpstreamUnavailable(upstream=self.name, reason="no connection") from error
        except TimeoutError as error:
            if self._is_cut:
                raise UpstreamInvalid(upstream=self.name, reason="the gateway stopped") from error
            seconds = settings.max_call_seconds if answered and limit.expired() else settings.timeout_seconds
            raise UpstreamTimeout(upstream=self.name, seconds=seconds) from error
        except aiohttp.ClientError as error:
            log.warning("upstream broke off", upstream=self.name, reason=_words_of(error))
            raise UpstreamInvalid(upstream=self.name, reason="the connection broke") from error

    @asynccontextmanager
    async def _may_be_cut(self, limit: asyncio.Timeout) -> AsyncIterator[None]:
        self._limits.add(limit)
        try:
            yield
        finally:
            self._limits.remove(limit)

    def cut(self) -> None:
        """End what still runs, as if the provider had broken off: closing its connections would not."""
        self._is_cut = True
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(0)

    async def close(self) -> None:
        """Close the connections. One that the provider takes nothing from is left to the end of the process."""
        if self._session is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._session.close()


def _words_of(error: Exception) -> str:
    """What a failure says. Never its repr: aiohttp's shows the request's headers, and our key in them."""
    return f"{type(error).__name__}: {error}"


def _payload(body: bytes) -> bytes | io.BytesIO:
    """What aiohttp is given to send: a large body piece by piece, so that it does not block the event loop."""
    return body if len(body) <= _LARGE_BYTES else io.BytesIO(body)


_OfARepeat = AlreadyCharged | CallLost | IdempotencyConflict


def may_be_retried(error: WaterfallError) -> bool:
    """Whether a client may send the call again by itself: it cannot run twice, and may fare better."""
    is_defect = type(error) is WaterfallError
    return not (
        is_defect
        or isinstance(error, UpstreamTimeout | UpstreamInvalid | HoldNotOpen | UnsupportedRoute | _OfARepeat)
    )
