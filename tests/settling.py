"""A chain, a vault, a ledger and a relayer beside each other, without a gateway: for what settlement alone does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Self

import sqlalchemy as sa
from service import Net, local_net

from waterfall.devnet import deploy
from waterfall.ledger import accounts, schema, views
from waterfall.ledger.books import Hold
from waterfall.ledger.journal import Caller
from waterfall.ledger.store import Ledger
from waterfall.metering import prices
from waterfall.receipts import Domain, canonical_hash, receipt_digest
from waterfall.settlement.relayer import Relayer, RelayerSettings
from waterfall.signers import Signer, from_hex
from waterfall.types import ZERO_ADDRESS, SignedReceipt, Usage, UsageReceipt

METER = deploy.METER
# The second is of anvil's fifth account, which everybody knows.
GAS = deploy.GAS, from_hex("0x47e179ec197488593b187f80a00eb0da91f1b9d0b13f8733639f19c30a34926a", name="test")
SALT = b"salt"
FUNDED = 10**6 * 10**6  # one USD in credit units
NO_HASH = "0x" + "00" * 32


def signed_receipt(held: Hold, amount: int, domain: Domain, platform: int) -> SignedReceipt:
    """The receipt of a call that cost this."""
    receipt = UsageReceipt(
        platform=platform,
        account=held.account,
        charge_id=held.charge_id,
        request_hash=NO_HASH,
        response_hash=NO_HASH,
        model="m",
        input_tokens=1,
        cached_input_tokens=0,
        output_tokens=1,
        reasoning_tokens=0,
        usage_hash=NO_HASH,
        price_id=canonical_hash(None),
        amount=amount,
        issued_at=1,
        complete=True,
    )
    digest = receipt_digest(domain, receipt)
    return SignedReceipt(
        id=held.receipt_id,
        chain_id=domain.chain_id,
        vault=domain.vault,
        receipt=receipt,
        digest="0x" + digest.hex(),
        meter=METER.address,
        signature="0x" + METER.sign(digest).hex(),
        surface="chat",
        metered=Usage(input_tokens=1, output_tokens=1),
        usage=None,
        rate_card=None,
    )


class Settlement:
    """A chain, a vault, a ledger and a relayer; funded accounts."""

    def __init__(
        self, net: Net, ledger: Ledger, *, gas: Sequence[Signer] = GAS, most_charges: int = 20
    ) -> None:
        self.net, self.ledger = net, ledger
        self.domain = Domain(net.chain.chain_id, net.chain.vault)
        self.accounts: list[str] = []
        self.relayer = Relayer(
            net.vault,
            ledger,
            RelayerSettings(
                deployed_block=net.chain.deployed_block,
                finality="latest",
                final_depth=64,
                poll_seconds=0.02,
                most_charges=most_charges,
                max_fee_cap=100 * 10**9,
            ),
            token=net.token,
            exit_delay=86400,
            meter=METER,
            gas=gas,
            owner=None,
        )

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls, folder: Path, *, labels: Sequence[str] = ("ada",), **options: object
    ) -> AsyncIterator[Self]:
        """One of its own, with a chain of its own, at work."""
        async with local_net(folder / "chain") as net:
            ledger = cls.open_ledger(folder, net)
            try:
                settlement = cls(net, ledger, **options)
                await settlement.open_accounts(labels)
                async with settlement.relaying():
                    yield settlement
            finally:
                ledger.close()

    @staticmethod
    def open_ledger(folder: Path, net: Net) -> Ledger:
        """The ledger in a folder."""
        chain = net.chain
        url = f"sqlite:///{folder}/w.db"
        return Ledger.open(url, chain_id=chain.chain_id, vault=chain.vault, platform=chain.platform)

    @contextlib.asynccontextmanager
    async def relaying(self) -> AsyncIterator[None]:
        """The relayer runs meanwhile."""
        relaying = asyncio.create_task(self.relayer.run())
        try:
            yield
        finally:
            relaying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await relaying

    @property
    def account(self) -> str:
        """The first."""
        return self.accounts[0]

    async def open_accounts(self, labels: Sequence[str]) -> None:
        """Open accounts and fund each with a dollar."""
        platform, vault = self.net.chain.platform, self.net.chain.vault
        await self.relayer.catch_up()
        for label in labels:
            account = await self.ledger.write(
                lambda tx, label=label: accounts.create_account(tx, platform, ZERO_ADDRESS, SALT, label)
            )
            self.accounts.append(account)
            hash_ = accounts.label_hash(SALT, label)
            await deploy.mint_and_deposit(self.net.anvil.rpc, vault, platform, ZERO_ADDRESS, hash_, 10**6)
        await self.relayer.catch_up()

    async def charge(self, amount: int = 10**6, account: str | None = None) -> int:
        """One call, held and captured; its sequence."""
        caller = Caller(account or self.account, None)
        held = await self.ledger.hold(
            caller, "m", prices.fixed(amount), block_time=self.ledger.block_time(60), expiry_margin=0
        )
        signed = signed_receipt(held, amount, self.domain, self.net.chain.platform)
        await self.ledger.capture(held, signed)
        return held.sequence

    async def states(self) -> dict[str, int]:
        """How many charges are in each state."""
        query = sa.select(schema.charges.c.state, sa.func.count()).group_by(schema.charges.c.state)
        return dict(await self.ledger.read(lambda c: c.execute(query).all()))

    async def settled(self, seconds: float = 30) -> None:
        """Wait until nothing is owed any more."""
        owed = sa.select(schema.charges.c.sequence).where(schema.is_unsettled).limit(1)
        async with asyncio.timeout(seconds):
            while await self.ledger.read(lambda c: c.execute(owed).first()) is not None:
                await asyncio.sleep(0.02)

    async def check_books(self, charged: int) -> None:
        """Exactly this was taken of the first account, here and on the chain."""
        record = await self.ledger.read(lambda c: views.account(c, self.account))
        on_chain = await self.net.vault.account(self.net.chain.platform, self.account)
        assert record.wallet.balance == on_chain.balance == FUNDED - charged
        assert (record.wallet.held, record.wallet.unsettled) == (0, 0)
        assert self.ledger.view.mismatches == []
        assert self.relayer.halted == {}

    def state(self, signer: Signer) -> object:
        """How the lane of a key is."""
        return self.relayer.parts[f"settle {signer.address}"].state

    async def until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        """Wait until something is so."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)
