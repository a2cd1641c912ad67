"""What lanes send: batches of charges and sweeps under the gas key, policies under the platform owner's."""

from dataclasses import dataclass, field

import structlog

from waterfall.chain import vault as calls
from waterfall.chain.rpc import Rpc
from waterfall.chain.token import TRANSFER_TOPIC, balance_of
from waterfall.errors import LaneHalted, LedgerError
from waterfall.keccak import keccak
from waterfall.ledger import slots, views
from waterfall.ledger.projection import UNKNOWN_LABEL, Block
from waterfall.ledger.slots import Slot
from waterfall.ledger.store import Ledger
from waterfall.receipts import Domain, settlement_digest
from waterfall.settlement.lane import Work, revert_reason
from waterfall.signers import Signer
from waterfall.types import Charge

log = structlog.get_logger()

_NOT_A_METER = "0x" + keccak(b"NotAMeter(uint128,address)")[:4].hex()
_BATCH_SECONDS = 30 * 60


@dataclass
class Batches:
    """Batches of the charges that wait, signed by the meter; and sweeps of deposit addresses when none do."""

    rpc: Rpc
    ledger: Ledger
    meter: Signer
    gas_signer: str
    token: str
    most_charges: int
    _limit: int = field(init=False)
    _domain: Domain = field(init=False)
    _to_sweep: dict[str, views.AccountRecord] = field(default_factory=dict, init=False)
    """By account: kept until its sweep is mined, so that one that could not be sent is tried again."""
    _watched: Block | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._limit = self.most_charges
        self._domain = Domain(self.ledger.chain_id, self.ledger.vault)

    async def next_work(self) -> Work | None:
        """The next batch, if charges wait; else the next sweep, if money waits."""
        if self.ledger.mismatches:
            raise LaneHalted(reason=self.ledger.mismatches[0])
        charges = await self.ledger.read(lambda c: slots.queued_charges(c, self._limit))
        if charges:
            return self._batch(tuple(charges))
        return self._sweep(next(iter(self._to_sweep.values()))) if self._to_sweep else None

    async def renew_work(self, slot: Slot) -> Work:
        """The same charges with a later deadline, or the same call."""
        if slot.purpose == "settle":
            charges = await self.ledger.read(lambda c: slots.batched_charges(c, slot))
            if charges:
                return self._batch(tuple(charges))
        return Work(slot.purpose, slot.target, slot.calldata, slot.gas, slot.reference, slot.deadline)

    async def mined(self, slot: Slot, succeeded: bool) -> None:
        """After a revert, halve the batch; stop when no batch can succeed."""
        if slot.purpose == "sweep":
            await self._swept(str(slot.reference), succeeded)
            return
        if succeeded:
            self._limit = self.most_charges
            return
        reason = await revert_reason(self.rpc, self.gas_signer, slot)
        log.error("batch reverted", nonce=slot.nonce, reason=reason)
        if reason == _NOT_A_METER:
            raise LaneHalted(
                reason=f"{self.meter.address} is not a meter of platform {self.ledger.platform} any more"
            )
        self._limit = max(1, self._limit // 2)

    def _batch(self, charges: tuple[Charge, ...]) -> Work:
        if self.ledger.head is None:
            raise LedgerError(reason="the chain has not been read yet")
        deadline = self.ledger.head.block.timestamp + _BATCH_SECONDS
        signature = self.meter.sign(settlement_digest(self._domain, self.ledger.platform, charges, deadline))
        return Work(
            purpose="settle",
            target=self.ledger.vault,
            calldata=calls.settle(self.ledger.platform, charges, deadline, signature),
            gas=calls.settle_gas(len(charges)),
            deadline=deadline,
            charges=charges,
        )

    def _sweep(self, account: views.AccountRecord) -> Work:
        return Work(
            purpose="sweep",
            reference=account.id,
            target=self.ledger.vault,
            calldata=calls.sweep(self.ledger.platform, account.owner, account.label_hash),
            gas=calls.SWEEP_GAS,
        )

    async def _swept(self, account: str, succeeded: bool) -> None:
        """A sweep was mined: done with, unless more has arrived since. One that failed is not repeated by itself."""
        record = self._to_sweep.get(account)
        if record is None:
            return
        if not succeeded:
            log.error("sweep reverted", account=account, address=record.deposit_address)
        if not succeeded or await balance_of(self.rpc, self.token, record.deposit_address) == 0:
            self._to_sweep.pop(account, None)

    async def watch_deposit_addresses(self) -> None:
        """Find deposit addresses that hold money: by the token's logs; at start and after a reorg, by asking each."""
        head = self.ledger.head
        if head is None or head.block == self._watched:
            return
        accounts = {
            account.deposit_address: account
            for account in await self.ledger.read(views.accounts)
            if account.label_hash != UNKNOWN_LABEL
        }
        candidates = set(accounts)
        if self._watched is not None and not await self._is_reorged(self._watched, head.block):
            criteria = {
                "address": self.token,
                "fromBlock": hex(self._watched.number + 1),
                "toBlock": hex(head.block.number),
                "topics": [TRANSFER_TOPIC, None, ["0x" + address[2:].rjust(64, "0") for address in accounts]],
            }
            logs = await self.rpc.call("eth_getLogs", criteria) if accounts else []
            candidates = {"0x" + entry["topics"][2][26:] for entry in logs}
        for address in candidates:
            if await balance_of(self.rpc, self.token, address) > 0:
                self._to_sweep[accounts[address].id] = accounts[address]
        self._watched = head.block

    async def _is_reorged(self, block: Block, head: Block) -> bool:
        others = [known for known in await self.ledger.recent_blocks() if known.number == block.number]
        return block.number >= head.number or (others != [] and block not in others)


@dataclass
class Policies:
    """Policies asked for, each once the calls made under the old one have settled."""

    ledger: Ledger

    async def next_work(self) -> Work | None:
        """The oldest policy order that nothing stands before."""
        due = await self.ledger.read(slots.due_policy)
        if due is None:
            return None
        order, account, policy = due
        return Work(
            purpose="policy",
            reference=str(order),
            target=self.ledger.vault,
            calldata=calls.set_policy(self.ledger.platform, account, policy),
            gas=calls.SET_POLICY_GAS,
        )

    async def renew_work(self, slot: Slot) -> Work:
        """The same call."""
        return Work(slot.purpose, slot.target, slot.calldata, slot.gas, slot.reference)

    async def mined(self, slot: Slot, succeeded: bool) -> None:
        """A policy that reverts never will succeed by itself."""
        if not succeeded:
            raise LaneHalted(reason=f"{slot.signer} may not set policies of platform {self.ledger.platform}")
        log.info("policy set", order=slot.reference)
