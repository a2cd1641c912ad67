import asyncio
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterfall.gateway.surfaces.chat import ChatMeter
from waterfall.gateway.surfaces.streams import NotAStream, events
from waterfall.receipts import bytes_hash
from waterfall.types import Usage

USAGE = {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}


def sse(chunk, end="\n\n"):
    return ("data: " + (chunk if isinstance(chunk, str) else json.dumps(chunk)) + end).encode()


def piece(text="a", finish=None, usage=None, **delta):
    choice = {"index": 0, "delta": {"content": text, **delta}, "finish_reason": finish}
    return {"choices": [choice], **({"usage": usage} if usage is not None else {})}


ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
LAST = {"choices": [], "usage": USAGE}
DONE = sse("[DONE]")
WHOLE = [sse(ROLE), sse(piece("He")), sse(piece("llo")), sse(END), sse(LAST), DONE]


async def cut(*chunks):
    async def upstream():
        for chunk in chunks:
            yield chunk

    return [event async for event in events(upstream())]


# ── Cutting ──────────────────────────────────────────────────────────────────────────────────────────


async def test_events__whole_stream__its_bytes_untouched_and_their_data():
    found = await cut(*WHOLE)
    assert [event.raw for event in found] == WHOLE
    assert [event.data for event in found] == [raw.removeprefix(b"data: ").strip() for raw in WHOLE]


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\r\r"])
async def test_events__every_cut_of_the_bytes__same_events(end):
    data = b"".join(sse(chunk, end) for chunk in (ROLE, piece("é🌊"), END, LAST, "[DONE]"))
    whole = await cut(data)
    assert len(whole) == 5
    for at in range(1, len(data)):
        assert await cut(data[:at], data[at:]) == whole
    assert await cut(*(data[n : n + 1] for n in range(len(data)))) == whole


@given(st.lists(st.integers(0, 400), max_size=8))
def test_events__any_cuts__lose_and_invent_no_byte(cuts):
    data = b"".join(WHOLE)
    places = sorted({min(at, len(data)) for at in cuts} | {0, len(data)})
    chunks = [data[a:b] for a, b in pairwise(places)]
    assert b"".join(event.raw for event in asyncio.run(cut(*chunks))) == data


async def test_events__comments_and_other_fields__are_passed_and_say_nothing():
    data = [b": keep-alive\n\n", b"event: message\nid: 1\nretry: 5\n\n", b"\n\n"]
    found = await cut(*data)
    assert b"".join(event.raw for event in found) == b"".join(data)
    assert all(event.data is None for event in found)


async def test_events__data_on_several_lines__is_one_chunk():
    (event,) = await cut(b'data: {"choices": [],\ndata: "usage": {"prompt_tokens": 1}}\n\n')
    assert event.object()["usage"] == {"prompt_tokens": 1}


async def test_events__no_blank_line_at_the_end__is_read_all_the_same():
    found = await cut(sse(LAST), b"data: [DONE]")
    assert [event.data for event in found] == [json.dumps(LAST).encode(), b"[DONE]"]


@pytest.mark.parametrize("text", ["[DONE]", " [DONE] ", "[DONE]\r"])
async def test_meter__done_in_any_spacing__is_the_end(text):
    _, _, meter = await metered(f"data:{text}\n\n".encode())
    assert meter.done


@pytest.mark.parametrize(
    "data",
    [
        b"data: nonsense\n\n",
        b"data: 5\n\n",
        b"data: []\n\n",
        b"data: \xff\n\n",
        b'data: {"error": {"message": "overloaded"}}\n\n',
        b'data: {"choices": {"a": 1}}\n\n',
        b'data: {"choices": 5}\n\n',
        b'{"id": "1", "choices": [{"message": {"content": "a whole answer"}}]}\n\n',
        b'{"id": "1"}',
        b"<html>\n\n</html>",
    ],
)
async def test_meter__not_the_stream_of_a_completion__is_refused(data):
    with pytest.raises(NotAStream):
        await metered(data)


async def test_events__an_event_without_end__is_refused_in_time():
    with pytest.raises(NotAStream, match="too large"):
        await cut(*[b"data: " + b"x" * 2**20] * 20)


@pytest.mark.parametrize(
    ("delta", "pieces"),
    [
        ({"content": "a"}, 1),
        ({"content": ""}, 0),
        ({"role": "assistant"}, 0),
        ({"content": None, "reasoning_content": "hm"}, 1),
        ({"tool_calls": [{"index": 0}]}, 1),
        ({"refusal": "no"}, 1),
        ({}, 0),
        (None, 0),
        ("text", 0),
    ],
)
async def test_meter__delta__is_a_piece_if_there_is_output_in_it(delta, pieces):
    _, _, meter = await metered(sse({"choices": [{"delta": delta}]}))
    assert meter.pieces == pieces


async def test_meter__several_choices__each_with_output_is_a_piece():
    choices = [{"delta": {"content": "a"}}, {"delta": {}}, {"delta": {"content": "b"}}, 5]
    _, _, meter = await metered(sse({"choices": choices}))
    assert meter.pieces == 2


# ── Metering ─────────────────────────────────────────────────────────────────────────────────────────


async def metered(*data, include_usage=False):
    """What went out at once, what waited for the capture, and the meter."""
    meter = ChatMeter(shows_usage=include_usage)
    now = [raw for event in await cut(*data) for raw in meter.take(event)]
    return now, meter.tail(), meter


def counted(pieces):
    return Usage(input_tokens=0, output_tokens=pieces), None


REPORTED = Usage(input_tokens=12, output_tokens=5), USAGE


async def test_meter__whole_stream__charged_as_reported_and_the_usage_hidden():
    now, tail, meter = await metered(*WHOLE)
    assert meter.result() == REPORTED
    assert meter.done
    assert now + tail == [*WHOLE[:4], DONE]
    assert DONE in tail, "the end leaves after the capture only"
    assert meter.response_hash() == bytes_hash(b"".join(WHOLE))


async def test_meter__usage_asked_for__is_shown_after_the_capture():
    now, tail, _ = await metered(*WHOLE, include_usage=True)
    assert now + tail == WHOLE
    assert tail == WHOLE[4:]


async def test_meter__keep_alive_behind_the_usage__is_still_shown_in_order():
    data = [*WHOLE[:5], b": ping\n\n", DONE]
    now, tail, meter = await metered(*data, include_usage=True)
    assert now + tail == data
    assert meter.result() == REPORTED


async def test_meter__usage_in_the_last_chunk_of_a_choice__is_the_last_word():
    data = [sse(piece()), sse(piece("b", "stop", USAGE)), DONE]
    now, tail, meter = await metered(*data)
    assert meter.result() == REPORTED
    assert now + tail == data


async def test_meter__usage_in_every_chunk__the_last_one_counts():
    early = {"prompt_tokens": 12, "completion_tokens": 1}
    data = [sse(piece("a", usage=early)), sse(piece("b", "stop", USAGE)), DONE]
    assert (await metered(*data))[2].result() == REPORTED


@pytest.mark.parametrize(
    "data",
    [
        [sse(piece("a", usage={"prompt_tokens": 12, "completion_tokens": 1})), sse(piece("b"))],
        [
            sse({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 0}}),
            sse(piece()),
            sse(piece()),
        ],
        [sse(piece()), sse(piece(usage={"prompt_tokens": 12, "completion_tokens": 2}))],
    ],
    ids=["partial, then output", "placeholder at the start", "partial, then cut"],
)
async def test_meter__partial_usage_of_a_stream_that_was_cut__is_not_trusted(data):
    _, _, meter = await metered(*data)
    assert not meter.done
    assert meter.result() == counted(2)


async def test_meter__placeholder_with_output_after_it__is_not_the_last_word():
    placeholder = {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 0}}
    _, _, meter = await metered(sse(placeholder), *WHOLE[:4], DONE)
    assert meter.done
    assert meter.result() == counted(2)


async def test_meter__cut_between_usage_and_done__is_charged_as_reported():
    _, _, meter = await metered(*WHOLE[:5])
    assert not meter.done
    assert meter.result() == REPORTED


async def test_meter__stream_without_usage__counts_its_pieces():
    _, _, meter = await metered(*WHOLE[:4], DONE)
    assert meter.result() == counted(2)


async def test_meter__usage_that_cannot_be_read__counts_its_pieces():
    unreadable = {"choices": [], "usage": {"prompt_tokens": 12}}
    _, _, meter = await metered(*WHOLE[:4], sse(unreadable), DONE)
    assert meter.result() == counted(2)


async def test_meter__explicit_zero__stays_zero():
    zero = {"prompt_tokens": 12, "completion_tokens": 0}
    _, _, meter = await metered(sse(ROLE), sse(END), sse({"choices": [], "usage": zero}), DONE)
    assert meter.result() == (Usage(input_tokens=12, output_tokens=0), zero)


async def test_meter__nothing_put_out_and_no_usage__is_nothing_to_charge():
    _, _, meter = await metered(sse(ROLE))
    assert meter.result() == (None, None)


EVENTS = st.lists(
    st.sampled_from([sse(ROLE), sse(piece()), sse(END), sse(LAST), sse(piece(usage=USAGE)), b": ping\n\n"]),
    max_size=12,
)


@given(EVENTS, st.booleans(), st.booleans())
def test_meter__any_stream__every_byte_leaves_once_in_order_but_a_hidden_usage(data, done, include_usage):
    data = [*data, DONE] if done else data
    now, tail, meter = asyncio.run(metered(*data, include_usage=include_usage))
    shown = [raw for raw in data if include_usage or raw != sse(LAST)]
    assert now + tail == shown
    assert DONE not in now
    assert meter.response_hash() == bytes_hash(b"".join(data))
    usage, reported = meter.result()
    assert reported in (None, USAGE)
    assert (usage is None) == (reported is None and sum(b'"content": "a"' in raw for raw in data) == 0)
