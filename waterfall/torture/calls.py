"""The callers: whole answers, streams, charges under idempotency keys; clients that leave, repeat, or reuse a key."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from waterfall.money import format_usd
from waterfall.receipts import bytes_hash
from waterfall.torture.upstream import content
from waterfall.torture.world import ADMIN_KEY, MODEL, World

Kind = Literal["whole", "stream", "leaving stream", "hang-up", "charge"]
_WEIGHTS: Mapping[Kind, int] = {"whole": 38, "stream": 25, "leaving stream": 8, "hang-up": 5, "charge": 24}
_MOST_TOKENS = 40
_OK, _ACCEPTED, _CONFLICT = 200, 202, 409
_SERVER_ERROR = 500
_RETRY_SECONDS = (0.2, 1.5)
_AGAIN, _REUSED = 0.4, 0.3
"""How many answered charges are asked for again, and how many keys are used for something else."""
_DONE = b"data: [DONE]"
_ERROR = b'"error":'


@dataclass(frozen=True, slots=True)
class Payer:
    """An account that calls."""

    id: str
    label: str
    owner: str
    label_hash: str
    deposit_address: str
    key: str = field(repr=False)
    kind: Literal["rich", "poor", "limited", "owned"]


@dataclass(slots=True)
class Call:
    """One call as its client saw it."""

    number: int
    account: str
    kind: Kind
    request_hash: str
    most_tokens: int
    amount: int | None = None
    """In credit units; None: it follows from the number."""
    outcome: str = "running"
    """answered, left, broken, cut, or refused: with the answer's code."""
    receipt: str | None = None

    @property
    def is_answered(self) -> bool:
        """Whether the client has a whole answer."""
        return self.outcome == "answered"


@dataclass
class Callers:
    """Makes calls at a steady rate until told to stop."""

    world: World
    payers: Sequence[Payer]
    rate: float
    """Calls a second."""
    most_at_once: int
    dice: random.Random
    calls: list[Call] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    """Answers that must never be."""
    resting: set[str] = field(default_factory=set)
    """Accounts that do not call for now."""
    repeats: Counter[str] = field(default_factory=Counter)
    """What was asked under a key for the second time, by what came of it."""
    _running: set["asyncio.Task[None]"] = field(default_factory=set, init=False)

    async def run(self, until: float) -> None:
        """Call until a time of the loop's clock."""
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            await asyncio.sleep(self.dice.uniform(0.5, 1.5) / self.rate)
            if len(self._running) < self.most_at_once:
                self._start()

    async def finish(self, seconds: float) -> None:
        """Let what runs end; what does not end by then is cut off."""
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)
        running = list(self._running)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    @property
    def at_once(self) -> int:
        """How many run now."""
        return len(self._running)

    def _start(self) -> None:
        payer = self.dice.choice([one for one in self.payers if one.id not in self.resting])
        kind = self.dice.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        task = asyncio.create_task(self._call(payer, len(self.calls) + 1, kind))
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.findings.append(f"a client failed: {task.exception()!r}")

    async def _call(self, payer: Payer, number: int, kind: Kind) -> None:
        most = self.dice.randint(1, _MOST_TOKENS)
        amount = None
        body: dict[str, Any]
        if kind == "charge":
            # No two are the same, so that each has a body of its own.
            amount = 10**9 * self.dice.randint(0, 1) + 1000 * number + self.dice.randint(0, 999)
            body = {"account": payer.id, "amount": format_usd(amount)}
        else:
            body = {
                "model": MODEL,
                "messages": [{"role": "user", "content": content(number)}],
                "max_tokens": most,
                "stream": kind in {"stream", "leaving stream"},
            }
        raw = json.dumps(body).encode()
        call = Call(number, payer.id, kind, bytes_hash(raw), most, amount)
        self.calls.append(call)
        try:
            if kind == "charge":
                await self._charge(call, raw)
            else:
                await self._chat(call, raw, payer.key)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            call.outcome = "broken" if not isinstance(error, TimeoutError) else "timed out"
        except asyncio.CancelledError:
            call.outcome = "never ended"
            self.findings.append(f"call {number} ({kind}) has not ended, long after everything was healed")
            raise
        finally:
            self.outcomes[call.outcome] += 1

    def _url(self) -> str:
        gateways = self.world.gateways()
        if not gateways:
            raise ConnectionError("no gateway is up")
        return self.dice.choice(gateways)

    # ── Chat ─────────────────────────────────────────────────────────────────────────────────────────

    async def _chat(self, call: Call, raw: bytes, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        patience = self.dice.uniform(0.001, 0.08) if call.kind == "hang-up" else None
        posting = self.world.session.post(f"{self._url()}/v1/chat/completions", data=raw, headers=headers)
        try:
            async with asyncio.timeout(patience), posting as response:
                call.receipt = response.headers.get("x-waterfall-receipt-id")
                if response.status != _OK:
                    self._refused(call, response.status, await response.read())
                elif call.kind in {"stream", "leaving stream"}:
                    await self._listen(call, response)
                else:
                    await response.read()
                    call.outcome = "answered"
        except TimeoutError:
            if call.kind != "hang-up":
                raise
            call.outcome = "left"

    async def _listen(self, call: Call, response: aiohttp.ClientResponse) -> None:
        leaves_after = self.dice.randint(1, 3) if call.kind == "leaving stream" else None
        seen, pieces = b"", 0
        async for data in response.content.iter_any():
            seen, pieces = seen + data, pieces + 1
            if leaves_after is not None and pieces >= leaves_after and _DONE not in seen:
                call.outcome = "left"
                response.close()
                return
        call.outcome = "answered" if _DONE in seen and _ERROR not in seen else "cut"

    def _refused(self, call: Call, status: int, raw: bytes) -> None:
        code = _code(raw)
        call.outcome = f"refused: {status} {code}"
        if code in {"internal_error", "hold_not_open"} or (status == _SERVER_ERROR and code != "500"):
            self.findings.append(f"call {call.number} was answered {status} {raw[:300]!r}")

    # ── Charges ──────────────────────────────────────────────────────────────────────────────────────

    async def _charge(self, call: Call, raw: bytes) -> None:
        key = f"charge {call.number}"
        status, answer = await self._insist(key, raw)
        if status != _ACCEPTED:
            self._refused(call, status, answer)
            return
        call.receipt = json.loads(answer)["id"]
        call.outcome = "answered"
        if self.dice.random() < _AGAIN:
            await self._repeat(call, key, raw)
        if self.dice.random() < _REUSED:
            await self._reuse(call, key)

    async def _repeat(self, call: Call, key: str, raw: bytes) -> None:
        """The same again, as a client does that has not seen its answer: the same receipt."""
        status, answer = await self._insist(key, raw)
        self.repeats[f"the same again: {status}"] += 1
        if status != _ACCEPTED or json.loads(answer)["id"] != call.receipt:
            self.findings.append(f"charge {call.number} was repeated and answered {status} {answer[:300]!r}")

    async def _reuse(self, call: Call, key: str) -> None:
        """Another body under the same key: refused, whatever else goes on."""
        other = json.dumps({"account": call.account, "amount": "0.000000000001"}).encode()
        status, answer = await self._insist(key, other)
        self.repeats[f"another body: {status}"] += 1
        if status != _CONFLICT:
            self.findings.append(
                f"the key of charge {call.number} was reused and answered {status} {answer[:300]!r}"
            )

    async def _insist(self, key: str, raw: bytes) -> tuple[int, bytes]:
        """Post a charge until there is an answer to it, as a good client does: broken and 5xx say nothing."""
        headers = {
            "Authorization": f"Bearer {ADMIN_KEY}",
            "Content-Type": "application/json",
            "Idempotency-Key": key,
        }
        while True:
            try:
                url = f"{self._url()}/api/charges"
                async with self.world.session.post(url, data=raw, headers=headers) as response:
                    answer = await response.read()
                    if response.status == _SERVER_ERROR:
                        self.findings.append(f"{key} was answered 500 {answer[:300]!r}")
                    if response.status < _SERVER_ERROR:
                        return response.status, answer
            except (aiohttp.ClientError, ConnectionError, TimeoutError):
                self.repeats["after a broken connection"] += 1
            await asyncio.sleep(self.dice.uniform(*_RETRY_SECONDS))


def _code(raw: bytes) -> str:
    try:
        return str(json.loads(raw)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return "?"
