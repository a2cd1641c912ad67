"""JSON-RPC over HTTP with one node, strictly: an answer is what was asked for, or there is none.

A URL may hold a key: no reason or message ever shows more of it than host and port.
Sources: https://www.jsonrpc.org/specification, RFC 9110 §10.2.3 (Retry-After).
"""

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import aiohttp
import orjson

from waterfall.chain.refusals import Fault, fault

Call = tuple[str, Sequence[Any]]
"""A method and its parameters."""

_LONGEST_REASON = 300
_NO_BATCHES = {HTTPStatus.BAD_REQUEST, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.REQUEST_ENTITY_TOO_LARGE}
_LIMITED = {429, -32005}
_REDACTED = "…"
_SHORTEST_SECRET = 6


class NoAnswer(Exception):
    """An endpoint gave no answer that can be used."""

    def __init__(
        self, reason: str, *, outcome: str = "failed", delivered: bool = True, retry_after: float = 0
    ) -> None:
        """A failure.

        Args:
            reason: why, without secrets.
            outcome: the same for counting: `failed`, `limited` or `wrong_chain`.
            delivered: False if the endpoint certainly never saw the request.
            retry_after: seconds for which it asks to be left alone.
        """
        super().__init__(reason)
        self.reason, self.outcome, self.delivered, self.retry_after = reason, outcome, delivered, retry_after


class Refused(Exception):
    """An endpoint answered with an error that is about the request, or may be."""

    def __init__(self, code: int, message: str, data: Any) -> None:
        super().__init__(message)
        self.code, self.message, self.data = code, message, data
        self.fault = fault(code, message)


class BatchesRefused(Exception):
    """A node takes one call a request."""


class Node:
    """One node's side of the wire."""

    def __init__(self, url: str, *, timeout_seconds: float, most_bytes: int) -> None:
        """Describe a node: where it is, how long it may take, and how much it may answer."""
        self._url = url
        self._secrets = _secrets(url)
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._most_bytes = most_bytes
        self._ids = itertools.count(1)

    def __repr__(self) -> str:
        return f"Node({name_of(self._url)})"

    async def single(self, http: aiohttp.ClientSession, method: str, parameters: Sequence[Any]) -> Any:
        """The result of one call.

        Raises:
            NoAnswer, Refused
        """
        number = next(self._ids)
        status, answer = await self._post(http, _request(number, method, parameters))
        # Older besu, Alchemy: an error about the request comes with status 400.
        is_error = isinstance(answer, dict) and "error" in answer
        if status != HTTPStatus.OK and not (status == HTTPStatus.BAD_REQUEST and is_error):
            raise NoAnswer(f"HTTP {status}")
        return self._result(answer, number)

    async def together(self, http: aiohttp.ClientSession, calls: Sequence[Call]) -> list[Any]:
        """The results of many calls in one request, each its own or a `Refused`.

        Raises:
            NoAnswer: to one of them at least.
            BatchesRefused
        """
        numbers = [next(self._ids) for _ in calls]
        body = [_request(number, *call) for number, call in zip(numbers, calls, strict=True)]
        status, answers = await self._post(http, body)
        if isinstance(answers, dict) and "error" in answers:
            self._refused(answers["error"])
            raise BatchesRefused
        if status in _NO_BATCHES:
            raise BatchesRefused
        if status != HTTPStatus.OK:
            raise NoAnswer(f"HTTP {status}")
        if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
            raise NoAnswer("its answer is not JSON-RPC")
        by_number = {answer.get("id"): answer for answer in answers if type(answer.get("id")) is int}
        if len(answers) == 1 and "error" in answers[0] and not by_number:
            raise BatchesRefused
        if len(answers) != len(calls) or set(by_number) != set(numbers):
            raise NoAnswer("it did not answer what was asked")
        results: list[Any] = []
        for number in numbers:
            try:
                results.append(self._result(by_number[number], number))
            except Refused as refused:
                results.append(refused)
        return results

    # ── Inside ───────────────────────────────────────────────────────────────────────────────────────

    def _result(self, answer: Any, number: int) -> Any:
        if not isinstance(answer, dict) or answer.get("jsonrpc") != "2.0":
            raise NoAnswer("its answer is not JSON-RPC")
        error = answer.get("error")
        if (error is None) == ("result" not in answer):
            raise NoAnswer("its answer is not JSON-RPC")
        if error is not None:
            refused = self._refused(error)  # whatever its id: who is limited may get none back
        if type(answer.get("id")) is not int or answer["id"] != number:
            raise NoAnswer("it did not answer what was asked")
        if error is not None:
            raise refused
        return answer["result"]

    def _refused(self, error: Any) -> Refused:
        """The error of an answer, if it is about the request."""
        code, message = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, None)
        if type(code) is not int or not isinstance(message, str):
            raise NoAnswer("its error is not JSON-RPC")
        data = error.get("data")
        refused = Refused(code, self._shown(message), self._redacted(data) if isinstance(data, str) else None)
        if refused.fault is Fault.NODE:
            raise NoAnswer(refused.message, outcome="limited" if code in _LIMITED else "failed")
        return refused

    # ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────

    async def _post(self, http: aiohttp.ClientSession, body: Any) -> tuple[int, Any]:
        """Status and decoded body; None is the body of what is not JSON in an answer that is none anyway."""
        try:
            async with http.post(
                self._url,
                data=orjson.dumps(body),
                headers={"Content-Type": "application/json", "Accept": "application/json"},
                timeout=self._timeout,
                allow_redirects=False,
            ) as response:
                if response.status == HTTPStatus.TOO_MANY_REQUESTS:
                    raise NoAnswer(
                        "HTTP 429",
                        outcome="limited",
                        retry_after=_seconds(response.headers.get("Retry-After")),
                    )
                if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise NoAnswer(
                        f"HTTP {response.status}", retry_after=_seconds(response.headers.get("Retry-After"))
                    )
                text = bytearray()
                async for chunk in response.content.iter_chunked(2**16):
                    text += chunk
                    if len(text) > self._most_bytes:
                        raise NoAnswer(f"its answer is larger than {self._most_bytes} bytes")
                status = response.status
        except TimeoutError:
            raise NoAnswer(f"no answer within {self._timeout.total:g} s") from None
        except aiohttp.ClientConnectorError as error:
            reason = getattr(error.os_error, "strerror", None) or type(error.os_error).__name__
            raise NoAnswer(self._shown(f"it cannot be reached: {reason}"), delivered=False) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # ValueError: what a peer may do to a URL, a header or a compressed body.
            raise NoAnswer(self._shown(f"{type(error).__name__}: {error}")) from None
        try:
            return status, orjson.loads(text)
        except orjson.JSONDecodeError:
            if status == HTTPStatus.OK:
                raise NoAnswer("its answer is not JSON") from None
            return status, None

    def _shown(self, text: str) -> str:
        """A text without anything secret, short, in one line."""
        text = " ".join(self._redacted(text).split())
        return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + _REDACTED

    def _redacted(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, _REDACTED)
        return text


def name_of(url: str) -> str:
    """What may be shown of a node's URL: host and port.

    Raises:
        ValueError: not an http(s) URL; the message does not show it.
    """
    wrong = "must be an http or https URL, such as https://node.example.com"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(wrong) from None
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.fragment or port == 0:
        raise ValueError(wrong)
    if url != "".join(url.split()) or not url.isprintable():
        raise ValueError(wrong)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{port or (443 if parts.scheme == 'https' else 80)}"


def _secrets(url: str) -> list[str]:
    """The parts of a URL that may be a key, longest first."""
    parts = urlsplit(url)
    path = parts.path.strip("/")
    found = {url, path, parts.query, *path.split("/"), parts.username or "", parts.password or ""}
    found |= {value for _, value in parse_qsl(parts.query)}
    return sorted((part for part in found if len(part) >= _SHORTEST_SECRET), key=len, reverse=True)


def _request(number: int, method: str, parameters: Sequence[Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": list(parameters)}


def _seconds(retry_after: str | None) -> float:
    """The value of a Retry-After header, in seconds; 0 where there is none that can be read."""
    if retry_after is None:
        return 0
    if retry_after.isascii() and retry_after.isdecimal():
        return float(retry_after[:9])
    try:
        then = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0
    if then.tzinfo is None:
        return 0
    return max(0.0, (then - datetime.now(UTC)).total_seconds())
