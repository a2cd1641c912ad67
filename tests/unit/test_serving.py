"""What happens between the hold and the capture, with an upstream that does what a test tells it."""

import asyncio
import json
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from making import ACCOUNT, FUNDED, METER, card

from waterfall.errors import UpstreamInvalid, UpstreamRefused, UpstreamTimeout, UpstreamUnavailable
from waterfall.gateway import serving as serving_
from waterfall.gateway.calls import Calls
from waterfall.gateway.serving import Serving, refused
from waterfall.gateway.surfaces.chat import Chat
from waterfall.ledger.journal import Caller
from waterfall.receipts import bytes_hash, check_signature, price_id

CHAT = Chat()
TARIFF = card("small", "1", "2")
USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
COST = (12 + 6) * 10**6
ANSWER = json.dumps({"choices": [{"message": {"content": "Hello"}}], "usage": USAGE}).encode()


def sse(chunk):
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def piece(text, finish=None):
    return sse({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})


DONE = b"data: [DONE]\n\n"
STREAM = [piece("He"), piece("ll"), piece("o", "stop"), sse({"choices": [], "usage": USAGE}), DONE]


@dataclass
class Upstream:
    """Answers with these bytes; an exception among them breaks the answer there, a future is waited for."""

    status: int = 200
    chunks: list = field(default_factory=list)
    error: Exception | None = None
    name: str = "fake"
    settings: object = field(
        default_factory=lambda: SimpleNamespace(output_limit_field="max_tokens", max_choices=128)
    )
    read: int = 0
    closed: bool = False

    @asynccontextmanager
    async def post(self, path, body, headers):
        assert path == "/chat/completions"
        self.body = json.loads(body)
        if self.error is not None:
            raise self.error
        try:
            yield SimpleNamespace(
                status=self.status,
                headers={"retry-after": "7", "x-other": "1"},
                content=SimpleNamespace(iter_any=self._pieces),
            )
        finally:
            self.closed = True

    async def _pieces(self):
        for chunk in self.chunks:
            self.read += 1
            if isinstance(chunk, Exception):
                raise chunk
            if isinstance(chunk, asyncio.Future):
                await chunk
                continue
            yield chunk


@dataclass
class Client:
    """Reads an answer, and leaves after so many messages if it is told to."""

    most: int | None = None
    got: list = field(default_factory=list)
    on_bytes: object = None

    def __post_init__(self):
        self._gone = asyncio.Event()

    async def receive(self):
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.got.append(message.get("body", b""))
        if self.on_bytes is not None:
            await self.on_bytes(message.get("body", b""))
        if self.most is not None and len(self.got) > self.most:
            self._gone.set()
            await asyncio.sleep(0)

    @property
    def body(self):
        return b"".join(self.got)


@pytest.fixture
def calls(desk):
    return Calls(desk.ledger, METER, max_projection_age_seconds=60, longest_call_seconds=1)


@pytest.fixture
def serve(calls):
    """Holds for a request and begins to serve it."""

    async def serve(upstream, **fields):
        model = SimpleNamespace(
            name="small",
            upstream=upstream,
            upstream_model="provider/small",
            card=TARIFF,
            vendor_card=TARIFF,
            price_id=price_id(TARIFF),
            default_max_output_tokens=100,
        )
        messages = [{"role": "user", "content": "Hi"}]
        request = CHAT.read(json.dumps({"model": "small", "messages": messages, **fields}).encode())
        held = await calls.hold(Caller(ACCOUNT, None), "chat", model, request.bound(model))
        return Serving(calls, CHAT, request, model, held, {}), held

    return serve


async def answered(serving, *, stream=False):
    """What the caller gets, refusals too."""
    try:
        return await (serving.streamed() if stream else serving.whole())
    except UpstreamRefused as refusal:
        return refused(CHAT, refusal)


def told(body):
    """A stream without what is told of its cost, and what that is."""
    comments = re.findall(rb": waterfall (\{[^}]*\})\n", body)
    return re.sub(rb": waterfall \{[^}]*\}\n\n?", b"", body), [json.loads(comment) for comment in comments]


async def ended(calls, desk, held):
    """The call once nothing of it runs any more."""
    await calls.drain(5)
    call = await desk.call(held)
    wallet = await desk.wallet()
    assert wallet.held == 0, "a hold leaked"
    return call


# ── Whole answers ────────────────────────────────────────────────────────────────────────────────────


async def test_whole__answer__charged_before_it_leaves_and_untouched(calls, desk, serve):
    serving, held = await serve(Upstream(chunks=[ANSWER[:20], ANSWER[20:]]))
    response = await serving.whole()
    call = await ended(calls, desk, held)
    assert response.body == ANSWER
    assert response.headers["x-waterfall-cost"] == "0.000018"
    assert call.settlement.state == "queued"
    assert call.receipt.receipt.amount == COST
    assert call.receipt.receipt.response_hash == bytes_hash(ANSWER)
    check_signature(call.receipt)


@pytest.mark.parametrize(
    ("upstream", "status", "state"),
    [
        (Upstream(500, [b'{"error": {"message": "down"}}']), 500, "released"),
        (Upstream(429, [b'{"error": {"message": "slow down"}}']), 429, "released"),
        (Upstream(429, [b"slow down"]), 429, "released"),
        (Upstream(400, [b'{"object": "error", "message": "too long"}']), 400, "released"),
        (Upstream(401, [b'{"error": {"message": "sk-secret"}}']), 502, "released"),
        (Upstream(302, [b""]), 502, "released"),
        (Upstream(504, [b"<html>Gateway Time-out</html>"]), 504, "lost"),
        (Upstream(502, [b'{"error": {"message": "down"}}']), 502, "lost"),
        (Upstream(524, [b""]), 524, "lost"),
    ],
    ids=["500", "429", "text", "other shape", "our key", "redirect", "504", "502", "524"],
)
async def test_whole__upstream_refuses__costs_nothing_and_is_free_where_it_cannot_have_run(
    calls, desk, serve, upstream, status, state
):
    serving, held = await serve(upstream)
    response = await answered(serving)
    assert response.status_code == status
    assert response.headers["retry-after"] == "7"
    assert b"sk-secret" not in response.body
    assert b"<html>" not in response.body
    assert json.loads(response.body)["error"]["message"]
    assert response.headers.get("x-should-retry") == ("false" if state == "lost" else None)
    assert (await ended(calls, desk, held)).settlement.state == state
    assert (await desk.wallet()).available == FUNDED


@pytest.mark.parametrize(
    ("upstream", "error", "state"),
    [
        (
            Upstream(error=UpstreamUnavailable(upstream="fake", reason="refused")),
            UpstreamUnavailable,
            "released",
        ),
        (Upstream(error=UpstreamTimeout(upstream="fake", seconds=5)), UpstreamTimeout, "lost"),
        (Upstream(chunks=[b"{", UpstreamInvalid(upstream="fake", reason="cut")]), UpstreamInvalid, "lost"),
        (Upstream(chunks=[b"not JSON"]), UpstreamInvalid, "lost"),
        (Upstream(chunks=[b"[]"]), UpstreamInvalid, "lost"),
        (Upstream(chunks=[b'{"choices": []}']), UpstreamInvalid, "lost"),
        (Upstream(chunks=[b'{"usage": null}']), UpstreamInvalid, "lost"),
        (Upstream(chunks=[b'{"usage": {"prompt_tokens": 1}}']), UpstreamInvalid, "lost"),
        (Upstream(chunks=[RuntimeError("a bug")]), RuntimeError, "lost"),
    ],
    ids=["not reached", "timeout", "cut", "no JSON", "a list", "no usage", "null", "half a usage", "bug"],
)
async def test_whole__no_usable_answer__is_free_only_where_it_cannot_have_cost(
    calls, desk, serve, upstream, error, state
):
    serving, held = await serve(upstream)
    with pytest.raises(error):
        await serving.whole()
    assert (await ended(calls, desk, held)).settlement.state == state
    assert (await desk.wallet()).available == FUNDED


async def test_whole__usage_with_figures_beyond_a_double__is_charged(calls, desk, serve):
    usage = {**USAGE, "finished_at_ns": 1_753_412_341_234_123_412}
    serving, held = await serve(Upstream(chunks=[json.dumps({"usage": usage}).encode()]))
    await serving.whole()
    call = await ended(calls, desk, held)
    assert call.receipt.receipt.amount == COST
    check_signature(call.receipt)


# ── Streams ──────────────────────────────────────────────────────────────────────────────────────────


async def streamed(serve, upstream, client, **options):
    serving, held = await serve(upstream, stream=True, **options)
    answer = await serving.streamed()
    await answer({"type": "http"}, client.receive, client.send)
    return held


async def test_stream__whole__bytes_untouched_and_the_usage_hidden(calls, desk, serve):
    client, upstream = Client(), Upstream(chunks=STREAM)
    held = await streamed(serve, upstream, client)
    body, facts = told(client.body)
    assert body == b"".join(STREAM[:3] + STREAM[4:])
    assert facts == [{"receipt_id": held.receipt_id, "cost": "0.000018", "balance": "9.999982"}]
    assert upstream.body["stream_options"] == {"include_usage": True}
    call = await ended(calls, desk, held)
    assert (call.receipt.receipt.amount, call.receipt.receipt.complete) == (COST, True)
    assert call.receipt.receipt.response_hash == bytes_hash(b"".join(STREAM))


async def test_stream__usage_asked_for__carries_the_cost_and_changes_no_other_byte(calls, desk, serve):
    client = Client()
    held = await streamed(serve, Upstream(chunks=STREAM), client, stream_options={"include_usage": True})
    body, (facts,) = told(client.body)
    assert body == b"".join(
        [
            *STREAM[:3],
            STREAM[3][:-3] + b',"waterfall":' + json.dumps(facts).replace(" ", "").encode() + b"}\n\n",
            DONE,
        ]
    )
    assert json.loads(body.split(b"data: ")[-2])["waterfall"] == facts
    call = await ended(calls, desk, held)
    assert call.receipt.receipt.response_hash == bytes_hash(b"".join(STREAM))


async def test_stream__pieces__leave_at_once_and_the_end_only_once_the_charge_is_durable(calls, desk, serve):
    states = []

    async def look(data):
        if data:
            call = await desk.call(held)
            states.append((data, call.settlement.state))

    loop = asyncio.get_running_loop()
    gates = [loop.create_future() for _ in range(3)]
    chunks = [chunk for pair in zip(STREAM[:3], gates, strict=True) for chunk in pair] + STREAM[3:]
    serving, held = await serve(Upstream(chunks=chunks), stream=True)
    client = Client(on_bytes=look)
    answer = await serving.streamed()
    reading = asyncio.create_task(answer({"type": "http"}, client.receive, client.send))
    for sent, gate in enumerate(gates, start=1):
        async with asyncio.timeout(5):
            while len(states) < sent:
                await asyncio.sleep(0.001)
        gate.set_result(None)
    await reading
    assert [state for _, state in states[:3]] == ["held"] * 3
    last, state = states[3]
    assert (told(last)[0], state) == (DONE, "queued")


@pytest.mark.parametrize("most", range(6))
async def test_stream__client_leaves_after_any_chunk__is_charged_in_full(calls, desk, serve, most):
    upstream = Upstream(chunks=STREAM)
    held = await streamed(serve, upstream, Client(most))
    call = await ended(calls, desk, held)
    assert call.receipt.receipt.amount == COST
    assert call.receipt.receipt.complete
    assert upstream.read == len(STREAM)


@pytest.mark.parametrize("pieces", [1, 2, 3])
async def test_stream__cut_by_the_upstream__charged_for_what_was_put_out_and_marked(
    calls, desk, serve, pieces
):
    cut = UpstreamInvalid(upstream="fake", reason="the connection broke")
    client = Client()
    held = await streamed(serve, Upstream(chunks=[*STREAM[:pieces], cut]), client)
    call = await ended(calls, desk, held)
    receipt = call.receipt.receipt
    assert (receipt.complete, receipt.input_tokens, receipt.output_tokens) == (False, 0, pieces)
    assert receipt.amount == pieces * 2 * 10**6
    assert b"the connection broke" in client.body
    assert DONE not in client.body


async def test_stream__cut_before_its_first_piece__is_lost_and_told(calls, desk, serve):
    client = Client()
    cut = UpstreamInvalid(upstream="fake", reason="the connection broke")
    held = await streamed(serve, Upstream(chunks=[b": ping\n\n", cut]), client)
    assert (await ended(calls, desk, held)).settlement.state == "lost"
    assert b"the connection broke" in client.body


@pytest.mark.parametrize("most", [10**6, 1000, 1], ids=["it fits", "in the middle", "at once"])
async def test_stream__client_takes_nothing__is_read_to_its_end_and_charged_in_full(
    calls, desk, serve, monkeypatch, most
):
    monkeypatch.setattr(serving_, "_MAX_WAITING_BYTES", most)
    came_back = asyncio.Event()

    async def take_nothing(_):
        await came_back.wait()

    client, upstream = Client(on_bytes=take_nothing), Upstream(chunks=[piece("x")] * 200 + STREAM)
    serving, held = await serve(upstream, stream=True)
    answer = await serving.streamed()
    answering = asyncio.create_task(answer({"type": "http"}, client.receive, client.send))
    call = await ended(calls, desk, held)
    assert upstream.read == len(upstream.chunks)
    assert (call.receipt.receipt.complete, call.receipt.receipt.amount) == (True, COST)
    came_back.set()
    await answering
    fits = most == 10**6
    assert (b"stream_dropped" in client.body, DONE in client.body) == (not fits, fits)


async def test_stream__client_that_reads_slowly__loses_nothing(calls, desk, serve):
    many = [piece(str(n)) for n in range(300)] + STREAM[2:]

    async def slowly(_):
        await asyncio.sleep(0)

    client = Client(on_bytes=slowly)
    held = await streamed(serve, Upstream(chunks=many), client)
    await ended(calls, desk, held)
    assert told(client.body)[0] == b"".join(many[:-2] + many[-1:])


async def test_stream__client_that_keeps_up__gets_more_than_may_wait_for_one(calls, desk, serve, monkeypatch):
    monkeypatch.setattr(serving_, "_MAX_WAITING_BYTES", 2 * len(b"".join(STREAM)))
    turns = [asyncio.get_running_loop().create_future() for _ in range(40)]
    chunks = [part for turn in turns for part in (piece("x"), turn)] + STREAM
    waiting = iter(turns)

    async def take(body):
        if body and (turn := next(waiting, None)) is not None:
            turn.set_result(None)

    client = Client(on_bytes=take)
    serving, held = await serve(Upstream(chunks=chunks), stream=True)
    answer = await serving.streamed()
    await answer({"type": "http"}, client.receive, client.send)
    await ended(calls, desk, held)
    assert client.body.count(piece("x")) == len(turns)
    assert b"stream_dropped" not in client.body


@pytest.mark.parametrize(
    ("upstream", "state"),
    [
        (Upstream(500, [b'{"error": {"message": "down"}}']), "released"),
        (Upstream(404, [b"no"]), "released"),
    ],
)
async def test_stream__upstream_refuses__is_answered_as_an_error_and_costs_nothing(
    calls, desk, serve, upstream, state
):
    serving, held = await serve(upstream, stream=True)
    response = await answered(serving, stream=True)
    assert response.status_code >= 400
    assert (await ended(calls, desk, held)).settlement.state == state


async def test_stream__not_reached__costs_nothing(calls, desk, serve):
    serving, held = await serve(
        Upstream(error=UpstreamUnavailable(upstream="fake", reason="refused")), stream=True
    )
    with pytest.raises(UpstreamUnavailable):
        await serving.streamed()
    assert (await ended(calls, desk, held)).settlement.state == "released"


async def test_stream__whole_answer_instead_of_events__is_lost_and_an_error(calls, desk, serve):
    serving, held = await serve(Upstream(chunks=[ANSWER]), stream=True)
    with pytest.raises(UpstreamInvalid):
        await serving.streamed()
    assert (await ended(calls, desk, held)).settlement.state == "lost"


async def test_whole__endless_answer__is_not_read_to_its_end(calls, desk, serve, monkeypatch):
    monkeypatch.setattr(serving_, "_MAX_ANSWER_BYTES", 1000)
    upstream = Upstream(chunks=[b"x" * 100] * 1000)
    serving, held = await serve(upstream)
    with pytest.raises(UpstreamInvalid, match="larger than 1000 bytes"):
        await serving.whole()
    assert upstream.read == 11
    assert (await ended(calls, desk, held)).settlement.state == "lost"


async def test_stream__bug_of_ours__ends_the_hold_and_says_nothing_of_it(calls, desk, serve):
    client = Client()
    held = await streamed(serve, Upstream(chunks=[STREAM[0], RuntimeError("a secret path")]), client)
    assert (await ended(calls, desk, held)).settlement.state == "lost"
    assert b"internal_error" in client.body
    assert b"secret" not in client.body
