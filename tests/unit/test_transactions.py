import itertools

import pytest
from eth_account import Account
from eth_account.typed_transactions import TypedTransaction
from hexbytes import HexBytes
from hypothesis import given
from hypothesis import strategies as st
from making import GAS, VAULT

from waterfall.chain import transactions
from waterfall.chain.rpc import RpcError, RpcUnavailable
from waterfall.chain.transactions import Broadcast, Fees, broadcast, bump, classify, suggest_fees
from waterfall.errors import ChainError

GWEI = 10**9
WEI = st.integers(0, 2**80)
FEES = st.builds(lambda a, b: Fees(max(a, b), min(a, b)), WEI, WEI)


class Node:
    """Answers each method from its list, in order; an exception is raised; the last answer stays."""

    def __init__(self, **answers):
        self._answers = answers
        self.asked = []

    async def call(self, method, *parameters):
        self.asked.append((method, *parameters))
        answers = self._answers[method]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def refusal(message):
    return RpcError(method="eth_sendRawTransaction", reason=message, data=None)


SILENCE = RpcUnavailable(endpoint="http://node", reason="TimeoutError", method="eth_sendRawTransaction")

# ── Signing ──────────────────────────────────────────────────────────────────────────────────────────


@given(
    st.integers(1, 2**32),
    st.integers(0, 2**32),
    st.none() | st.just(VAULT),
    st.binary(max_size=200),
    st.integers(21_000, 30_000_000),
    FEES,
    st.integers(0, 2**70),
)
def test_sign__any_transaction__bytes_of_eth_account(chain_id, nonce, target, calldata, gas, fees, value):
    signed = transactions.sign(
        GAS, chain_id=chain_id, nonce=nonce, target=target, calldata=calldata, gas=gas, fees=fees, value=value
    )
    fields = {"to": bytes.fromhex(target[2:])} if target else {}
    theirs = Account.from_key(b"\xb2" * 32).sign_transaction(
        {
            **fields,
            "type": 2,
            "chainId": chain_id,
            "nonce": nonce,
            "data": calldata,
            "gas": gas,
            "value": value,
            "maxFeePerGas": fees.max_fee,
            "maxPriorityFeePerGas": fees.priority_fee,
        }
    )
    assert signed.raw == bytes(theirs.raw_transaction)
    assert signed.tx_hash == "0x" + theirs.hash.hex().removeprefix("0x")
    assert Account.recover_transaction(signed.raw).lower() == GAS.address


def test_sign__same_fields__same_bytes():
    def once():
        return transactions.sign(GAS, chain_id=1, nonce=1, target=VAULT, calldata=b"", gas=1, fees=Fees(2, 1))

    assert once() == once()
    assert TypedTransaction.from_bytes(HexBytes(once().raw)).as_dict()["nonce"] == 1


# ── Fees ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("base", "tip", "cap", "expected"),
    [
        (10, 2, 100, Fees(22, 2)),
        (10, 2, 15, Fees(15, 2)),
        (10, 50, 15, Fees(15, 15)),
        (0, 0, 100, Fees(0, 0)),
    ],
)
async def test_suggest_fees__block_and_tip__twice_the_base_fee_plus_the_tip_capped(base, tip, cap, expected):
    node = Node(eth_getBlockByNumber=[{"baseFeePerGas": hex(base)}], eth_maxPriorityFeePerGas=[hex(tip)])
    assert await suggest_fees(node, cap) == expected


@given(FEES, FEES, st.integers(0, 2**81))
def test_bump__any_fees__both_at_least_a_tenth_higher_or_none_at_the_cap(last, suggested, cap):
    fees = bump(last, suggested, cap)
    if fees is None:
        assert max(suggested.max_fee, last.max_fee + last.max_fee // 8 + 1) > cap
        return
    assert fees.max_fee <= cap
    assert fees.priority_fee <= fees.max_fee
    assert fees.max_fee >= max(suggested.max_fee, last.max_fee + 1)
    assert fees.priority_fee >= max(suggested.priority_fee, last.priority_fee + 1)
    assert 10 * fees.max_fee >= 11 * last.max_fee
    assert 10 * fees.priority_fee >= 11 * last.priority_fee


# ── Broadcasts ───────────────────────────────────────────────────────────────────────────────────────

# What nodes say, from their sources.
MESSAGES = {
    Broadcast.ACCEPTED: [
        "already known",  # geth, reth
        "transaction already imported",  # anvil
        "ALREADY_EXISTS: already known",  # erigon
        "AlreadyKnown",  # nethermind
        "Known transaction",  # besu
        "known transaction: 0xabcd",  # older geth
        "tx already in mempool",
    ],
    Broadcast.REFUSED: [
        "nonce too low",  # geth
        "nonce too low: address 0xabcd, tx: 1 state: 2",
        "insufficient funds for gas * price + value: balance 0, tx cost 1",
        "Insufficient funds for gas * price + value",  # anvil
        "intrinsic gas too low",
        "replacement transaction underpriced",
        "transaction underpriced",
        "max fee per gas less than block base fee: address 0xabcd, maxFeePerGas: 1, baseFee: 2",
        "exceeds block gas limit",
        "invalid sender",
        "invalid chain id for signer: have 1 want 2",
    ],
    Broadcast.UNKNOWN: [
        "",
        "internal error",
        "txpool is full",
        "unknown transaction type",
        "transaction type not supported",
        "unknown account",
        "rate limit exceeded",
        "tx fee (1.00 ether) exceeds the configured cap (0.50 ether)",
    ],
}


@pytest.mark.parametrize(
    ("message", "outcome"), [(message, outcome) for outcome, all_ in MESSAGES.items() for message in all_]
)
def test_classify__words_of_a_node__what_they_mean(message, outcome):
    assert classify(message) is outcome
    assert classify(message.upper()) is outcome


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("0xabcd", Broadcast.ACCEPTED),
        (refusal("already known"), Broadcast.ACCEPTED),
        (refusal("nonce too low"), Broadcast.REFUSED),
        (refusal("what?"), Broadcast.UNKNOWN),
        (SILENCE, Broadcast.UNKNOWN),
    ],
)
async def test_broadcast__answer_of_a_node__three_outcomes(answer, outcome):
    node = Node(eth_sendRawTransaction=[answer])
    assert (await broadcast(node, b"\x02\xff"))[0] is outcome
    assert node.asked == [("eth_sendRawTransaction", "0x02ff")]


# ── By hand ──────────────────────────────────────────────────────────────────────────────────────────


def chain(**changed):
    answers = {
        "eth_estimateGas": ["0x186a0"],
        "eth_chainId": ["0x7a69"],
        "eth_getTransactionCount": ["0x5"],
        "eth_getBlockByNumber": [{"baseFeePerGas": "0x1"}],
        "eth_maxPriorityFeePerGas": ["0x1"],
        "eth_sendRawTransaction": ["0xabcd"],
        "eth_getTransactionReceipt": [None, {"status": "0x1"}],
    }
    return Node(**{**answers, **changed})


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Polls without waiting."""
    monkeypatch.setattr(transactions, "_POLL_SECONDS", 0)


@pytest.mark.parametrize("target", [VAULT, None])
async def test_transact__mined__receipt(target):
    node = chain()
    assert await transactions.transact(node, GAS, target, b"\x01") == {"status": "0x1"}
    sent = next(parameters for method, *parameters in node.asked if method == "eth_sendRawTransaction")
    fields = TypedTransaction.from_bytes(HexBytes(sent[0])).as_dict()
    assert (fields["nonce"], fields["gas"], fields["chainId"]) == (5, 120_000, 31337)
    assert fields["to"] == (bytes.fromhex(target[2:]) if target else b"")


@pytest.mark.parametrize("answer", [refusal("what?"), SILENCE])
async def test_transact__nobody_knows__waits_for_the_receipt(answer):
    node = chain(eth_sendRawTransaction=[answer])
    assert (await transactions.transact(node, GAS, VAULT, b""))["status"] == "0x1"


async def test_transact__refused__says_why():
    with pytest.raises(ChainError, match="insufficient funds"):
        await transactions.transact(
            chain(eth_sendRawTransaction=[refusal("insufficient funds")]), GAS, VAULT, b""
        )


async def test_transact__mined_and_failed__is_an_error():
    with pytest.raises(ChainError, match="mined and failed"):
        await transactions.transact(chain(eth_getTransactionReceipt=[{"status": "0x0"}]), GAS, VAULT, b"")


async def test_transact__never_mined__gives_up_at_its_limit():
    with pytest.raises(ChainError, match="was not mined within"):
        await transactions.transact(
            chain(eth_getTransactionReceipt=[None]), GAS, VAULT, b"", timeout_seconds=0.01
        )


def test_messages__fixtures__every_fragment_of_the_table_is_met():
    known = " ".join(itertools.chain(*MESSAGES.values())).lower()
    unmet = [fragment for fragment in transactions._ACCEPTED if fragment not in known]  # noqa: SLF001
    assert unmet == []
