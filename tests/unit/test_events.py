import re
from dataclasses import fields

import pytest
from eth_abi.abi import encode
from eth_hash.auto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st
from making import ACCOUNT, PLATFORM, USD, word
from web3 import Web3

from waterfall.chain import artifacts, events
from waterfall.chain.events import Charged, Deposited, Position, Rejection
from waterfall.errors import ChainError

ABI = [item for item in artifacts.load("CreditVault").abi if item["type"] == "event"]
# OpenZeppelin's EIP712 declares it and never emits it.
OURS = {item["name"]: item for item in ABI if item["name"] != "EIP712DomainChanged"}
CONTRACT = Web3().eth.contract(abi=list(ABI))
VAULT = "0x" + "c0" * 20


def abi_type(item):
    if item["type"].startswith("tuple"):
        return "(" + ",".join(abi_type(part) for part in item["components"]) + ")" + item["type"][5:]
    return item["type"]


def snake(name):
    return re.sub("([A-Z])", lambda match: "_" + match[1].lower(), name)


def values(item):
    """Any value of an ABI type, as eth_abi takes it."""
    kind = item["type"]
    if kind == "tuple":
        return st.tuples(*(values(part) for part in item["components"]))
    if kind == "address":
        return st.binary(min_size=20, max_size=20).map(lambda data: "0x" + data.hex())
    if kind == "bytes32":
        return st.binary(min_size=32, max_size=32)
    if item.get("internalType", "").startswith("enum"):
        return st.integers(0, len(Rejection) - 1)
    return st.integers(0, 2 ** int(kind.removeprefix("uint")) - 1)


def log_of(item, arguments):
    """What `eth_getLogs` answers for an event with these arguments."""
    pairs = list(zip(item["inputs"], arguments, strict=True))
    indexed = [encode([abi_type(field)], [value]) for field, value in pairs if field["indexed"]]
    rest = [(abi_type(field), value) for field, value in pairs if not field["indexed"]]
    signature = f"{item['name']}({','.join(abi_type(field) for field in item['inputs'])})"
    return {
        "address": VAULT,
        "topics": ["0x" + topic.hex() for topic in (keccak(signature.encode()), *indexed)],
        "data": "0x" + encode([kind for kind, _ in rest], [value for _, value in rest]).hex(),
        "blockNumber": "0x1f",
        "blockHash": word("block"),
        "logIndex": "0x2",
        "transactionHash": word("transaction"),
        "transactionIndex": "0x0",
    }


def flat(item, value):
    """Name and value of a decoded field, structs spread out, in our notation."""
    if item["type"] == "tuple":
        for part in item["components"]:
            yield from flat(part, value[part["name"]])
    elif isinstance(value, bytes):
        yield snake(item["name"]), "0x" + value.hex()
    else:
        yield snake(item["name"]), value.lower() if isinstance(value, str) else value


def by_web3(item, log):
    from_hex = {**log, "blockNumber": 31, "logIndex": 2, "transactionIndex": 0}
    for name in ("blockHash", "transactionHash", "data"):
        from_hex[name] = bytes.fromhex(log[name][2:])
    from_hex["topics"] = [bytes.fromhex(topic[2:]) for topic in log["topics"]]
    arguments = CONTRACT.events[item["name"]]().process_log(from_hex)["args"]
    return dict(pair for field in item["inputs"] for pair in flat(field, arguments[field["name"]]))


def test_signatures__compiled_abi__knows_every_event():
    assert {kind.__name__ for kind in events.SIGNATURES} == set(OURS)


@pytest.mark.parametrize("name", sorted(OURS))
def test_signatures__compiled_abi__same_types_and_names_in_the_same_order(name):
    item = OURS[name]
    kind = getattr(events, name)
    assert events.SIGNATURES[kind] == f"{name}({','.join(abi_type(field) for field in item['inputs'])})"
    names = [part["name"] for field in item["inputs"] for part in field.get("components") or [field]]
    assert [field.name for field in fields(kind)] == [snake(name) for name in names]
    flags = [field["indexed"] for field in item["inputs"]]
    assert flags == sorted(flags, reverse=True), "decode relies on indexed fields coming first"


@pytest.mark.parametrize("name", sorted(OURS))
@given(data=st.data())
@settings(max_examples=25)
def test_decode__any_event_of_the_vault__what_web3_reads(name, data):
    item = OURS[name]
    log = log_of(item, [data.draw(values(field)) for field in item["inputs"]])
    position, event = events.decode(log)
    assert position == Position(31, 2, word("transaction"))
    assert type(event) is getattr(events, name)
    assert {field.name: getattr(event, field.name) for field in fields(event)} == by_web3(item, log)


def test_decode__rejection__is_named():
    item = OURS["ChargeRejected"]
    _, event = events.decode(log_of(item, [PLATFORM, bytes.fromhex(ACCOUNT[2:]), 1, 3]))
    assert event.reason is Rejection.MAX_PER_WINDOW


def test_rejection__compiled_abi__has_as_many_reasons_as_the_interface():
    names = ["ZeroAmount", "Balance", "MaxPerCharge", "MaxPerWindow", "PolicyExpired"]
    names += ["AllowanceCap", "AllowanceExpired"]
    assert [snake(name).removeprefix("_") for name in names] == [reason.name.lower() for reason in Rejection]


def test_decode__unknown_event__is_none():
    log = log_of(OURS["Charged"], [bytes(32), 1, 1, 1, bytes(32)])
    log["topics"][0] = word("Refunded(uint128)")
    assert events.decode(log) is None


def test_decode__log_without_topics__is_none():
    log = log_of(OURS["Charged"], [bytes(32), 1, 1, 1, bytes(32)])
    assert events.decode({**log, "topics": []}) is None


@pytest.mark.parametrize("data", ["0x", "0x" + "00" * 95, "0x" + "00" * 97, "0x" + "00" * 128])
def test_decode__log_that_lacks_words__is_refused_and_never_read_as_zeros(data):
    log = log_of(OURS["Charged"], [bytes(32), 1, 1, 1, bytes(32)])
    with pytest.raises(ChainError, match="log of Charged"):
        events.decode({**log, "data": data})


def test_decode__deposit_of_twenty_million__exact():
    arguments = [PLATFORM, bytes.fromhex(ACCOUNT[2:]), VAULT, VAULT, bytes(32), 20_000_000 * USD, 1]
    _, event = events.decode(log_of(OURS["Deposited"], arguments))
    assert isinstance(event, Deposited)
    assert event.amount == 20_000_000 * USD


def test_decode__charge__by_hand():
    item = OURS["Charged"]
    _, event = events.decode(
        log_of(item, [bytes.fromhex(ACCOUNT[2:]), 2**63 + 1, 2**96 - 1, 7, b"\x01" * 32])
    )
    assert event == Charged(ACCOUNT, 2**63 + 1, 2**96 - 1, 7, "0x" + "01" * 32)
