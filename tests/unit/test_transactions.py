import pytest
from eth_account import Account
from eth_account.typed_transactions import TypedTransaction
from hexbytes import HexBytes
from hypothesis import given
from hypothesis import strategies as st
from making import GAS, VAULT

from waterfall.chain import transactions
from waterfall.chain.rpc import RpcError, RpcUnavailable
from waterfall.chain.transactions import Broadcast, Fees, Refusal, broadcast
from waterfall.errors import ChainError

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


SILENCE = RpcUnavailable(reason="node:443: no answer within 10 s", method="eth_sendRawTransaction")

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


# ── Broadcasts ───────────────────────────────────────────────────────────────────────────────────────


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
    found, detail = await broadcast(node, b"\x02\xff")
    assert found is outcome
    assert isinstance(detail, str)
    assert node.asked == [("eth_sendRawTransaction", "0x02ff")]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (refusal("nonce too low"), Refusal.NONCE_TOO_LOW),
        (refusal("replacement transaction underpriced"), Refusal.UNDERPRICED),
        (refusal("insufficient funds; nonce too low"), Refusal.NONCE_TOO_LOW),
        (refusal("already known"), None),
        (refusal("what?"), None),
        ("0xabcd", None),
        # The words are there, but not from everyone.
        (RpcUnavailable(reason="a:1: nonce too low; b:1: HTTP 500"), None),
    ],
)
async def test_broadcast__refused_by_all__the_reason(answer, reason):
    assert (await broadcast(Node(eth_sendRawTransaction=[answer]), b"\x02")).reason is reason


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
