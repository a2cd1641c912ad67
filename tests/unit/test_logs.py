"""Lines of the log, as they come to its file."""

import io
import json
import threading

import pytest

from waterfall.cli import logs
from waterfall.cli.logs import Lines


class File(io.StringIO):
    """Counts how often it was written through, and tells."""

    def __init__(self):
        super().__init__()
        self.flushes = 0
        self.flushed = threading.Event()

    def flush(self):
        self.flushes += 1
        self.flushed.set()


def tell(lines, text):
    lines.write(text)
    lines.flush()


def test_lines__now_and_then__are_written_at_once():
    file = File()
    tell(Lines(file), "one\n")
    assert (file.getvalue(), file.flushes) == ("one\n", 1)


def test_lines__thick__are_written_together_in_order_and_none_is_lost():
    file = File()
    lines = Lines(file)
    for number in range(10_000):
        tell(lines, f"{number}\n")
    while file.getvalue().count("\n") < 10_000:
        file.flushed.clear()
        assert file.flushed.wait(5)
    assert file.getvalue().splitlines() == [str(number) for number in range(10_000)]
    assert file.flushes < 1000


def test_lines__of_many_threads__are_whole_and_none_is_lost():
    file = File()
    lines = Lines(file)
    threads = [
        threading.Thread(target=lambda name=name: [tell(lines, f"{name}{n}\n") for n in range(500)])
        for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while file.getvalue().count("\n") < 2000:
        file.flushed.clear()
        assert file.flushed.wait(5)
    assert set(file.getvalue().splitlines()) == {f"{name}{n}" for name in "abcd" for n in range(500)}


def test_lines__nobody_reads_any_more__the_service_goes_on():
    file = File()
    lines = Lines(file)
    file.close()
    tell(lines, "one\n")


@pytest.mark.parametrize("value", [2**90, "half \ud800", float("nan"), {1: 2}, b"bytes", "line\nbreak"])
def test_json__whatever_is_logged__is_one_line_that_can_be_read(value):
    line = logs._json({"event": "seen", "value": value}, default=repr)  # noqa: SLF001
    assert "\n" not in line
    assert json.loads(line)["event"] == "seen"
    if isinstance(value, int):
        assert json.loads(line)["value"] == value
