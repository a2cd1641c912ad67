"""A lane, an indexer and a ledger on the fake chain, with a clock that tests turn."""

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
from waterfall.settlement import lane as lanes
from waterfall.settlement.indexer import Indexer
from waterfall.settlement.lane import Lane, LaneSettings
from waterfall.settlement.work import Batches, Policies

GWEI = 10**9
CAP = 100 * GWEI
ADA, BOB = accounts.label_hash(SALT, "ada"), accounts.label_hash(SALT, "bob")


@dataclass
class Clock:
    """The host's clock, as lanes read it."""

    seconds: float = 1_000_000

    def install(self, monkeypatch):
        """Put it in the place of the real one."""
        monkeypatch.setattr(lanes, "now_ms", lambda: int(1000 * self.seconds))
        monkeypatch.setattr(lanes, "time", SimpleNamespace(monotonic=lambda: self.seconds))
        return self


@dataclass
class Relay:
    """Everything between a captured charge and the chain."""

    ledger: object
    clock: Clock
    chain: FakeChain = field(default_factory=lambda: FakeChain(final_depth=20))
    most_charges: int = 500
    cap: int = CAP

    def __post_init__(self):
        self.desk = Desk(self.ledger, METER)
        self.start()

    def start(self):
        """Begin as a process does: with what the database holds and nothing else."""
        self.indexer = Indexer(
            Vault(self.chain, VAULT), self.ledger, deployed_block=0, finality="latest", final_depth=64
        )
        self.batches = Batches(self.chain, self.ledger, METER, GAS.address, TOKEN, self.most_charges)
        self.policies = Policies(self.ledger)
        self.lane = self._lane("settle", GAS, self.batches)
        self.policy_lane = self._lane("policy", OWNER, self.policies)

    def _lane(self, name, signer, work):
        return Lane(
            name=name,
            rpc=self.chain,
            ledger=self.ledger,
            signer=signer,
            next_work=work.next_work,
            renew_work=work.renew_work,
            mined=work.mined,
            settings=LaneSettings(max_fee_cap=self.cap, rebroadcast_seconds=5, replace_seconds=30),
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
