"""A stream as its client reads it."""

import json
import re


def without_cost(raw: bytes) -> bytes:
    """A stream as its upstream sent it: without what the gateway tells of the cost."""
    return re.sub(rb": waterfall \{[^}]*\}\n\n?|,\x22waterfall\x22:\{[^}]*\}", b"", raw)


def events_of(text: str | dict) -> list[dict | str]:
    """What a client of the stream reads: the data of its events, decoded; or the error that came in its place."""
    if isinstance(text, dict):
        return [text]
    blocks = text.replace("\r\n", "\n").replace("\r", "\n").split("\n\n")
    assert blocks[-1] == "", "the last event is not complete, so no client reads it"
    data = [
        "\n".join(line[5:].removeprefix(" ") for line in block.split("\n") if line.startswith("data:"))
        for block in blocks
    ]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in data if entry]


def pieces_of(events: list[dict | str]) -> str:
    chunks = [event for event in events if isinstance(event, dict) and "choices" in event]
    return "".join(choice["delta"].get("content") or "" for c in chunks for choice in c["choices"])


def error_of(events: list[dict | str]) -> dict:
    """The stream's error, which must be its last event."""
    errors = [event["error"] for event in events if isinstance(event, dict) and "error" in event]
    assert len(errors) == 1
    assert events[-1] == {"error": errors[0]}
    assert "[DONE]" not in events
    return errors[0]
