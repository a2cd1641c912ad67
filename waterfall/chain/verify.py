"""The whole proof of a receipt: what it says of itself, and what the chain says of it."""

from dataclasses import dataclass

from waterfall.chain.events import TOPICS, Charged
from waterfall.chain.vault import Vault
from waterfall.errors import VerificationFailed
from waterfall.metering.prices import amount
from waterfall.metering.usage import UsageUnreadable, read
from waterfall.money import format_usd
from waterfall.receipts import check_signature
from waterfall.types import SignedReceipt

_CHARGED_TOPIC = next(topic for topic, (event, _) in TOPICS.items() if event is Charged)


@dataclass(frozen=True, slots=True)
class Proof:
    """What was shown, in the order of the checks, and where the charge is."""

    shown: tuple[str, ...]
    transaction: str
    block: int


def check_amount(signed: SignedReceipt) -> str:
    """Recompute the amount from the provider's usage and the rate card; what was shown.

    Raises:
        VerificationFailed
    """
    receipt = signed.receipt
    _check_counts(signed)
    if signed.rate_card is None:
        return f"amount {format_usd(receipt.amount)} USD, stated by the platform without usage"
    price = amount(signed.metered, signed.rate_card)
    if receipt.amount > price:
        raise VerificationFailed(
            reason=f"its amount is {format_usd(receipt.amount)} USD, usage and rate card make {format_usd(price)} USD"
        )
    counts = "usage" if signed.usage is not None else "the platform's own token counts"
    if signed.usage_removed:
        counts += " (the provider's usage object is kept no more)"
    if receipt.amount < price:  # the hold caps what is charged, but no receipt says what was held
        return f"amount {format_usd(receipt.amount)} USD; note: less than the {format_usd(price)} USD that {counts} and rate card make"
    return f"amount {format_usd(price)} USD, recomputed from {counts} and rate card"


def _check_counts(signed: SignedReceipt) -> None:
    """See that the receipt, what was metered and what the provider reported are the same."""
    receipt, metered = signed.receipt, signed.metered
    for name in ("input_tokens", "cached_input_tokens", "output_tokens", "reasoning_tokens"):
        if getattr(receipt, name) != getattr(metered, name):
            raise VerificationFailed(
                reason=f"its {name} are {getattr(receipt, name)}, and {getattr(metered, name)} were metered"
            )
    had_usage = signed.usage is not None or signed.usage_removed
    if receipt.complete != had_usage and signed.rate_card is not None:
        raise VerificationFailed(reason="it is called complete without the provider's usage, or the reverse")
    if signed.usage is None:
        return
    try:
        reported = read(signed.surface or "chat", signed.usage)
    except UsageUnreadable as error:
        raise VerificationFailed(reason=error.message) from None
    if reported != metered:
        raise VerificationFailed(reason=f"its token counts are {metered}, the provider reported {reported}")


async def verify(signed: SignedReceipt, vault: Vault, chain_id: int, *, from_block: int = 0) -> Proof:
    """Prove a receipt against the chain.

    Args:
        signed: the receipt.
        vault: the vault you trust, on the chain you trust.
        chain_id: of that chain.
        from_block: where to look for the charge from.

    Raises:
        VerificationFailed: the first thing that differs.
        ChainError: the chain cannot be read.
    """
    receipt = signed.receipt
    if (signed.chain_id, signed.vault) != (chain_id, vault.address):
        raise VerificationFailed(
            reason=f"it is of vault {signed.vault} on chain {signed.chain_id}, not {vault.address} on {chain_id}"
        )
    check_signature(signed)
    shown = [f"signature of {signed.meter} over the receipt", check_amount(signed)]

    check = await vault.verify_receipt(receipt, bytes.fromhex(signed.signature[2:]))
    if check.digest != signed.digest or check.signer != signed.meter:
        raise VerificationFailed(reason=f"the vault reads signer {check.signer} and digest {check.digest}")
    if not check.valid_at_issue:
        raise VerificationFailed(
            reason=f"{signed.meter} was not a valid meter of the platform when it was issued"
        )
    shown.append("meter valid when it was issued" + ("" if check.valid_now else ", retired since"))
    if not check.used:
        raise VerificationFailed(reason="its charge is not on the chain")

    topics = [_CHARGED_TOPIC, receipt.account, f"0x{receipt.charge_id:064x}"]
    logs = await vault.logs(fromBlock=hex(from_block), toBlock="latest", topics=topics)
    if not logs:
        raise VerificationFailed(
            reason=f"its charge id is used, but no charge of this account with it was found from block {from_block} on"
        )
    position, event = logs[0]
    assert isinstance(event, Charged)  # noqa: S101 - its topic was asked for
    if event.receipt_hash != signed.digest:
        raise VerificationFailed(reason=f"the chain's charge is for another receipt, {event.receipt_hash}")
    if event.amount != receipt.amount:
        raise VerificationFailed(
            reason=f"{format_usd(event.amount)} USD was charged, the receipt says {format_usd(receipt.amount)} USD"
        )
    shown.append(f"charged on-chain, statement line {event.entry}")
    return Proof(tuple(shown), position.tx_hash, position.block)
