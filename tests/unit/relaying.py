"""A lane, an indexer and a ledger on the fake chain, with a clock that tests turn."""

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace

from fake_chain import FakeChain
from making import (
    ACCOUNT,
    GAS,
    METER,
    OWNER,
    SALT,
    TOKEN,
    USD,
    VAULT,
    Desk,
)

from waterfall.chain.vault import Vault
from waterfall.ledger import accounts, slots
from waterfall.settlement import batches, gas, indexer, pace, sweeps
from waterfall.settlement import lane as lanes
from waterfall.settlement.batches import Batches
from waterfall.settlement.finality import Finality
from waterfall.settlement.indexer import Indexer
from waterfall.settlement.lane import Lane, LaneSettings
from waterfall.settlement.policies import Policies
from waterfall.settlement.sweeps import Sweeps

GWEI = 10**9
CAP = 100 * GWEI
ADA, BOB = accounts.label_hash(SALT, "ada"), accounts.label_hash(SALT, "bob")


@dataclass
class Clock:
    """Time as settlement reads it."""

    seconds: float = 1_000_000
    host_ahead: float = 0
    """How far the host's clock was set forward, which nothing may mind."""

    def install(self, monkeypatch):
        """Put it in the place of the real one."""
        monkeypatch.setattr(lanes, "now_ms", lambda: int(1000 * (self.seconds + self.host_ahead)))
        for module in (lanes, batches, gas, sweeps, indexer, pace):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.seconds))
        return self


@dataclass
class Relay:
    """Everything between a captured charge and the chain."""

    ledger: object
    clock: Clock
    chain: FakeChain = field(default_factory=lambda: FakeChain(final_depth=20))
    most_charges: int = 500
    cap: int = CAP
    worst_gas: int = 0
    signers: tuple = (GAS,)
    finality: object = "latest"
    interval: float = 0
    """Seconds between blocks, as batches are told."""

    def __post_init__(self):
        self.desk = Desk(self.ledger, METER)
        self.start()

    def start(self):
        """Begin as a process does: with what the database holds and nothing else."""
        finality = Finality(self.chain, self.finality, 64)
        self.indexer = Indexer(Vault(self.chain, VAULT), self.ledger, finality, deployed_block=0)
        self.batches = Batches(
            self.chain,
            self.ledger,
            METER,
            self.most_charges,
            is_in_flight=lambda: any(lane.slot is not None for lane in self.lanes),
            block_interval=lambda: self.interval,
        )
        self.sweeps = Sweeps(self.chain, self.ledger, TOKEN)
        self.policies = Policies(self.chain, self.ledger, finality)
        turn = asyncio.Lock()
        sources = self.sweeps.overdue, self.batches, self.sweeps
        self.lanes = [self._lane(signer.address, signer, sources, turn) for signer in self.signers]
        self.lane = self.lanes[0]
        self.policy_lane = self._lane("policy", OWNER, (self.policies,), asyncio.Lock())

    def _lane(self, name, signer, sources, turn):
        return Lane(
            name=name,
            rpc=self.chain,
            ledger=self.ledger,
            signer=signer,
            sources=sources,
            settings=LaneSettings(max_fee_cap=self.cap, worst_gas=self.worst_gas),
            read_again=self.indexer.read_again,
            turn=turn,
        )

    async def index(self):
        """Bring the projection to the head."""
        while await self.indexer.step():
            pass

    async def fund(self, dollars=10, label=ADA):
        """Let a deposit arrive."""
        self.chain.mine(lambda state: state.deposit(dollars * USD, label=label))
        await self.index()

    async def mine(self, *actions, **options):
        """Make a block and read it."""
        self.chain.mine(*actions, **options)
        await self.index()

    async def settle(self, most=20):
        """Go on until everything is on the chain and every slot is closed."""
        for _ in range(most):
            self.clock.seconds += 6
            await self.index()
            worked = await self.lane.step()
            if not worked and await self.in_flight() is None:
                return
            self.chain.mine()
        raise AssertionError("it never settles")

    async def in_flight(self, signer=GAS):
        """The slot in flight, if there is one."""
        return await self.ledger.read(lambda c: slots.first_open_slot(c, signer.address))

    def pending(self, signer=GAS):
        """What waits in the mempool under a key."""
        return [t for (sender, _), t in sorted(self.chain.pending.items()) if sender == signer.address]

    def sent(self):
        """The raw transactions broadcast so far."""
        return [raw for (raw,) in self.chain.sent("eth_sendRawTransaction")]

    def balance(self, account=ACCOUNT):
        """The account's balance as the vault holds it."""
        return self.chain.state.accounts[account].balance
