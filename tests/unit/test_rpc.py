"""What the pool makes of URLs, headers and numbers; what it does with nodes is in tests/faults."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterfall.chain import jsonrpc
from waterfall.chain.endpoint import BUCKETS, Latency
from waterfall.chain.jsonrpc import Node
from waterfall.chain.rpc import Rpc, RpcUnavailable, quantity
from waterfall.errors import SettingsError

KEYS = st.text("abcdefghijklmnopqrstuvwxyzABCDEF0123456789_-", min_size=6, max_size=64)


def only(url):
    (endpoint,) = Rpc(url).endpoints
    return endpoint


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://mainnet.example/v3/key", "mainnet.example:443"),
        ("http://127.0.0.1:8545", "127.0.0.1:8545"),
        ("http://user:password@Node.Example/?key=1", "node.example:80"),
        ("http://[::1]:8545/", "[::1]:8545"),
    ],
)
def test_rpc__url__only_host_and_port_are_shown(url, name):
    assert only(url).name == name
    assert repr(Rpc(url)) == f"Rpc({name})"
    assert repr(only(url)) == f"Endpoint({name})"


@given(KEYS, KEYS, KEYS)
def test_shown__text_with_parts_of_the_url__has_none_of_them(path, value, password):
    url = f"https://user:{password}@node.example/v2/{path}?apikey={value}"
    node = Node(url, timeout_seconds=1, most_bytes=1)
    assert repr(node) == "Node(node.example:443)"
    for text in (url, f"a {path} b", f"?apikey={value}", f"{password}\n{path}", f"/v2/{path}?apikey={value}"):
        shown = node._shown(text)  # noqa: SLF001
        assert not any(secret in shown for secret in (path, value, password))
        assert "\n" not in shown


def test_shown__long_text__is_cut():
    assert len(Node("http://node", timeout_seconds=1, most_bytes=1)._shown("word " * 1000)) <= 301  # noqa: SLF001


def test_rpc__no_node__is_a_mistake():
    with pytest.raises(SettingsError, match="no node"):
        Rpc([])


@given(st.integers(0, 2**256 - 1))
def test_quantity__hex__its_number(value):
    assert quantity(hex(value)) == value


@pytest.mark.parametrize("value", [None, 5, "5", "", "0x", "0xzz", "-0x1", [], {}, True])
def test_quantity__anything_else__is_no_answer(value):
    with pytest.raises(RpcUnavailable, match="something else than a number"):
        quantity(value)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("0", 0),
        ("7", 7),
        ("99999999999999999999", 999_999_999),
        ("-7", 0),
        ("7.5", 0),
        ("soon", 0),
        ("٧", 0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Thu, 01 Jan 2026 00:00:00", 0),
    ],
)
def test_retry_after__header__seconds(header, seconds):
    assert jsonrpc._seconds(header) == seconds  # noqa: SLF001


def test_retry_after__date__seconds_until_then():
    header = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    assert 3500 < jsonrpc._seconds(header) <= 3600  # noqa: SLF001


@given(st.lists(st.floats(0, 100)))
def test_latency__any_answers__each_in_one_bucket(all_seconds):
    latency = Latency()
    for seconds in all_seconds:
        latency.add(seconds)
    assert latency.count == len(all_seconds) == sum(latency.buckets)
    for bound in BUCKETS:
        within = sum(latency.buckets[: BUCKETS.index(bound) + 1])
        assert within == sum(seconds <= bound for seconds in all_seconds)
