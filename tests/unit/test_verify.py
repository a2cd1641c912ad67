from types import SimpleNamespace

import pytest
from making import ACCOUNT, CHAIN_ID, METER, VAULT, card, sign, word

from waterfall.chain.events import Charged, Position
from waterfall.chain.vault import ReceiptCheck
from waterfall.chain.verify import check_amount, verify
from waterfall.cli.receipts import parse, prove
from waterfall.errors import VerificationFailed
from waterfall.ledger.books import Hold
from waterfall.receipts import price_id

TARIFF = card("small", "1", "2")
USAGE = {"prompt_tokens": 10, "completion_tokens": 5}
PRICE = 20 * 10**6  # (10 × 1 + 5 × 2) USD a million
HELD = Hold(1, 2**32 + 1, "ab" * 16, ACCOUNT, PRICE, 0)


def receipt(amount=PRICE, usage=USAGE, tariff=TARIFF, **changed):
    fields = {"input_tokens": 10, "output_tokens": 5, **changed}
    if tariff is not None:
        fields = {"price_id": price_id(tariff), **fields}
    return sign(HELD, amount, usage=usage, **fields).model_copy(update={"rate_card": tariff})


class Chain:
    """What the vault answers of one receipt: the truth, unless told otherwise."""

    address = VAULT

    def __init__(self, signed, *, charge=None, logs=None, **check):
        facts = {
            "digest": signed.digest,
            "signer": signed.meter,
            "valid_at_issue": True,
            "valid_now": True,
            "used": True,
        }
        self._check = ReceiptCheck(**{**facts, **check})
        fields = {
            "account": signed.receipt.account,
            "id": signed.receipt.charge_id,
            "amount": signed.receipt.amount,
            "entry": 7,
            "receipt_hash": signed.digest,
        }
        event = Charged(**{**fields, **(charge or {})})
        self._logs = [(Position(9, 1, word("tx")), event)] if logs is None else logs
        self.asked = None

    async def verify_receipt(self, receipt, signature):
        assert len(signature) == 65
        return self._check

    async def logs(self, **criteria):
        self.asked = criteria
        return self._logs


# ── The amount ───────────────────────────────────────────────────────────────────────────────────────


def test_check_amount__usage_and_rate_card__recomputed():
    assert check_amount(receipt()) == "amount 0.00002 USD, recomputed from usage and rate card"


def test_check_amount__less_than_the_price__says_so_and_not_why():
    shown = check_amount(receipt(PRICE - 1))
    assert shown == "amount 0.000019999999 USD; note: less than the 0.00002 USD that usage and rate card make"


def test_check_amount__more_than_the_price__fails():
    with pytest.raises(VerificationFailed, match="usage and rate card make"):
        check_amount(receipt(PRICE + 1))


def test_check_amount__counts_that_the_provider_did_not_report__fails():
    with pytest.raises(VerificationFailed, match="the provider reported"):
        check_amount(receipt(input_tokens=9))


def test_check_amount__usage_that_cannot_be_read__fails():
    with pytest.raises(VerificationFailed, match="completion_tokens is missing"):
        check_amount(receipt(usage={"prompt_tokens": 10}))


@pytest.mark.parametrize(("usage", "complete"), [(None, True), (USAGE, False)])
def test_check_amount__complete_without_usage_or_the_reverse__fails(usage, complete):
    with pytest.raises(VerificationFailed, match="called complete"):
        check_amount(receipt(usage=usage, complete=complete))


def test_check_amount__cut_answer__recomputed_from_what_was_delivered():
    shown = check_amount(receipt(10 * 10**6, usage=None, input_tokens=0))
    assert shown == "amount 0.00001 USD, recomputed from the platform's own token counts and rate card"


def test_check_amount__no_rate_card__is_what_the_platform_stated():
    assert "stated by the platform" in check_amount(receipt(tariff=None, usage=None))


def test_check_amount__counts_that_are_not_what_was_metered__fails():
    with pytest.raises(VerificationFailed, match="cached_input_tokens are 11, and 10 were metered"):
        check_amount(receipt(usage=None, cached_input_tokens=11))


# ── The whole proof ──────────────────────────────────────────────────────────────────────────────────


async def test_verify__honest_receipt__proof():
    signed = receipt()
    chain = Chain(signed)
    proof = await verify(signed, chain, CHAIN_ID, from_block=5)
    assert (proof.transaction, proof.block) == (word("tx"), 9)
    assert proof.shown[0].startswith("signature of")
    assert "recomputed" in proof.shown[1]
    assert proof.shown[2:] == ("meter valid when it was issued", "charged on-chain, statement line 7")
    assert chain.asked["topics"][1:] == [ACCOUNT, f"0x{2**32 + 1:064x}"]
    assert (chain.asked["fromBlock"], chain.asked["toBlock"]) == ("0x5", "latest")


async def test_verify__meter_retired_since__still_holds():
    signed = receipt()
    proof = await verify(signed, Chain(signed, valid_now=False), CHAIN_ID)
    assert "retired since" in proof.shown[2]


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"digest": word("x")}, "the vault reads signer"),
        ({"signer": "0x" + "00" * 20}, "the vault reads signer"),
        ({"valid_at_issue": False}, "was not a valid meter"),
        ({"used": False}, "not on the chain"),
        ({"logs": []}, "no charge of this account with it was found from block 0 on"),
        ({"charge": {"receipt_hash": word("x")}}, "another receipt"),
        ({"charge": {"amount": PRICE + 1}}, "the receipt says"),
        ({"charge": {"amount": 1}}, "the receipt says"),
    ],
)
async def test_verify__chain_says_otherwise__fails(lie, reason):
    signed = receipt()
    with pytest.raises(VerificationFailed, match=reason):
        await verify(signed, Chain(signed, **lie), CHAIN_ID)


@pytest.mark.parametrize(("chain_id", "vault"), [(1, VAULT), (CHAIN_ID, "0x" + "11" * 20)])
async def test_verify__receipt_of_another_vault__fails_without_asking_it(chain_id, vault):
    with pytest.raises(VerificationFailed, match="it is of vault"):
        await verify(receipt(), SimpleNamespace(address=vault), chain_id)


async def test_verify__forged_signature__fails_without_asking_the_chain():
    forged = receipt().model_copy(update={"signature": "0x" + METER.sign(bytes(32)).hex()})
    with pytest.raises(VerificationFailed):
        await verify(forged, SimpleNamespace(address=VAULT), CHAIN_ID)


# ── What stands around it ────────────────────────────────────────────────────────────────────────────


def shown(signed, **changed):
    """A settled receipt as the gateway shows it."""
    receipt = signed.model_dump(mode="json")
    names = ("account", "charge_id", "model")
    return {
        **{name: receipt["receipt"][name] for name in names},
        **dict.fromkeys(("created_at", "captured_at", "settled_at"), 1),
        **dict.fromkeys(("held", "cost"), "0.00002"),
        "excess": "0.00",
        "surface": "chat",
        "id": signed.id,
        "status": "settled",
        "reason": None,
        "transaction": word("tx"),
        "block": 9,
        "receipt": receipt,
        **changed,
    }


@pytest.mark.parametrize(
    "changed",
    [{}, {"status": "final"}, {"status": "queued", "transaction": None, "block": None}],
)
async def test_prove__true_around_it__proof(changed):
    signed = receipt()
    proven, proof = await prove(shown(signed, **changed), Chain(signed), CHAIN_ID)
    assert (proven, proof.block) == (signed, 9)


@pytest.mark.parametrize(
    "changed",
    [
        {"id": "00" * 16},
        {"charge_id": "7"},
        {"account": word("other")},
        {"model": "large"},
        {"cost": "0.01"},
        {"cost": None},
        {"transaction": word("other")},
        {"transaction": None},
        {"block": 10},
        {"block": None},
        {"status": "queued", "block": 10},
        {"status": "lost"},
    ],
)
async def test_prove__altered_around_it__fails(changed):
    signed = receipt()
    with pytest.raises(VerificationFailed, match="around it"):
        await prove(shown(signed, **changed), Chain(signed), CHAIN_ID)


async def test_prove__bare_receipt__proof():
    signed = receipt()
    proven, _ = await prove(signed.model_dump(mode="json"), Chain(signed), CHAIN_ID)
    assert proven == signed


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"receipt": None, "status": "lost", "reason": "cut"}, "no signed receipt in it: lost, cut"),
        ({"receipt": None}, "no signed receipt in it"),
        ({"status": "x"}, "no signed receipt in it: x"),
        ({"receipt": {}}, "Field required"),
        ({}, "no signed receipt in it"),
        ([], "Input should be an object"),
        (None, "Input should be an object"),
        ({"signature": "", "id": "\ud800"}, "Invalid JSON"),
    ],
)
def test_parse__no_receipt__says_what_is_missing(found, reason):
    with pytest.raises(VerificationFailed, match=reason):
        parse(found)


@pytest.mark.parametrize("depth", [300, 900])
async def test_prove__usage_nested_too_deeply__fails(depth):
    found = receipt().model_dump(mode="json")
    for _ in range(depth):
        found["usage"] = {"a": found["usage"]}
    with pytest.raises(VerificationFailed):
        await prove(found, SimpleNamespace(address=VAULT), CHAIN_ID)
