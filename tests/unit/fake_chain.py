"""A chain in memory: blocks, logs, receipts, nonces, reorgs, and a vault that follows the interface's rules.

It answers as a node does, so that lanes and the indexer run on it unchanged. What real nodes will not do on
demand can be scripted: answers that never come, transactions that vanish, blocks that are replaced.
"""

import copy
import hashlib
import zlib
from collections import defaultdict
from dataclasses import astuple, dataclass, field

from eth_abi.abi import decode, encode
from eth_account import Account
from eth_account.typed_transactions import TypedTransaction
from eth_hash.auto import keccak
from hexbytes import HexBytes
from making import BLOCK_TIME, CHAIN_ID, METER, PLATFORM, TOKEN, VAULT, policy_set

from waterfall.chain import artifacts, events, vault
from waterfall.chain.rpc import RpcError, RpcUnavailable
from waterfall.chain.token import TRANSFER_TOPIC
from waterfall.receipts import Domain, recover, settlement_digest
from waterfall.types import ZERO_ADDRESS, Charge, Policy

SECONDS = 12
MAX_DEADLINE = 3600
EXIT_DELAY = 86_400
CREDIT_PER_TOKEN = 10**6
GAS_PRICE_ORACLE = "0x420000000000000000000000000000000000000f"
BASE_FEE, TIP = 10**9, 10**8
_INDEXED = {
    item["name"]: sum(part["indexed"] for part in item["inputs"])
    for item in artifacts.load("CreditVault").abi
    if item["type"] == "event"
}


class Reverted(Exception):
    """A transaction that fails; `data` is what the vault reverts with."""

    def __init__(self, error="", types=(), values=()):
        super().__init__(error)
        self.data = "0x" + (keccak(error.encode())[:4] + encode(types, values)).hex() if error else "0x"


# ── The vault ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class AccountState:
    """An account as the vault stores it."""

    balance: int = 0
    entries: int = 0
    policy: Policy = field(default_factory=Policy)
    window: int = 0
    spent: int = 0
    exit_amount: int = 0
    exit_matures_at: int = 0


@dataclass
class State:
    """Everything a block changes: accounts and used ids of one platform, tokens, nonces."""

    accounts: dict = field(default_factory=lambda: defaultdict(AccountState))
    used: set = field(default_factory=set)
    earned: int = 0
    tokens: dict = field(default_factory=lambda: defaultdict(int))
    nonces: dict = field(default_factory=lambda: defaultdict(int))
    timestamp: int = BLOCK_TIME

    # Each returns the events it emits.

    def deposit(self, amount, *, owner=ZERO_ADDRESS, label, payer="0x" + "99" * 20):
        """Credit arrives."""
        account = vault.account_id(PLATFORM, owner, label)
        state = self.accounts[account]
        state.balance += amount
        state.entries += 1
        return [events.Deposited(PLATFORM, account, payer, owner, label, amount, state.entries)]

    def set_policy(self, account, policy):
        """The platform sets limits."""
        state = self.accounts[account]
        spent = state.spent if self._current(state) else 0
        windowed = policy.window_seconds is not None
        state.spent = spent if windowed else 0
        state.window = self.timestamp // policy.window_seconds if windowed else 0
        state.policy = policy
        return [policy_set(account, policy)]

    def settle(self, charges):
        """Charges are made, one by one."""
        emitted = []
        for charge in charges:
            if charge.id not in self.used:
                emitted += self._charge(charge)
        return emitted

    def _charge(self, charge):
        state, reason = self.accounts[charge.account], None
        policy, amount = state.policy, charge.amount
        exit_amount = state.exit_amount if self.timestamp < state.exit_matures_at else 0
        spent = amount + (state.spent if self._current(state) else 0)
        if amount == 0:
            reason = events.Rejection.ZERO_AMOUNT
        elif amount > state.balance + exit_amount:
            reason = events.Rejection.BALANCE
        elif policy.max_per_charge is not None and amount > policy.max_per_charge:
            reason = events.Rejection.MAX_PER_CHARGE
        elif policy.max_per_window is not None and spent > policy.max_per_window:
            reason = events.Rejection.MAX_PER_WINDOW
        elif policy.expires_at is not None and self.timestamp >= policy.expires_at:
            reason = events.Rejection.POLICY_EXPIRED
        if reason is not None:
            return [events.ChargeRejected(PLATFORM, charge.account, charge.id, reason)]
        emitted = []
        if policy.window_seconds is not None:
            state.spent, state.window = spent, self.timestamp // policy.window_seconds
        if amount > state.balance:
            missing = amount - state.balance
            state.balance += missing
            state.exit_amount -= missing
            emitted.append(events.ExitDrawn(charge.account, charge.id, missing))
        state.balance -= amount
        state.entries += 1
        self.earned += amount
        self.used.add(charge.id)
        return [
            *emitted,
            events.Charged(charge.account, charge.id, amount, state.entries, charge.receipt_hash),
        ]

    def request_exit(self, account, amount):
        """The owner starts to take credit out."""
        state = self.accounts[account]
        state.balance -= amount
        state.exit_amount += amount
        state.exit_matures_at = self.timestamp + EXIT_DELAY
        state.entries += 1
        fields = amount, state.exit_amount, state.exit_matures_at, state.entries
        return [events.ExitRequested(PLATFORM, account, *fields)]

    def cancel_exit(self, account):
        """The owner takes that back."""
        state = self.accounts[account]
        amount, state.exit_amount, state.exit_matures_at = state.exit_amount, 0, 0
        state.balance += amount
        state.entries += 1
        return [events.ExitCancelled(PLATFORM, account, amount, state.entries)]

    def finalize_exit(self, account):
        """The owner is paid out; what is less than a token's unit stays."""
        state = self.accounts[account]
        tokens, remainder = divmod(state.exit_amount, CREDIT_PER_TOKEN)
        state.exit_amount, state.exit_matures_at = 0, 0
        state.balance += remainder
        state.entries += 1
        fields = "0x" + "99" * 20, tokens, remainder, state.entries
        return [events.ExitFinalized(PLATFORM, account, *fields)]

    def _current(self, state):
        seconds = state.policy.window_seconds
        return seconds is not None and state.window == self.timestamp // seconds


# ── The chain ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Transaction:
    """A transaction that waits or was mined."""

    hash: str
    sender: str
    nonce: int
    target: str
    calldata: bytes
    max_fee: int
    priority_fee: int
    gas: int


@dataclass
class FakeBlock:
    """A block and the state after it."""

    number: int
    hash: str
    parent: str
    timestamp: int
    state: State
    logs: list = field(default_factory=list)
    transactions: list = field(default_factory=list)
    """With each, whether it succeeded."""


class FakeChain:
    """One node of one chain."""

    url = "http://fake"

    def __init__(self, *, safe_depth=0, final_depth=0):
        """A chain with its first block. Depths say where the tags stand; None: the node has no such tag."""
        self.safe_depth, self.final_depth = safe_depth, final_depth
        self.meters = {METER.address}
        self.pending = {}
        self.asked = []
        self.range_limit = 10**9
        self.base_fee, self.tip = BASE_FEE, TIP
        self.wei = defaultdict(lambda: 10**21)
        """What each key has to pay for gas with."""
        self.poison = set()
        """Ids of charges that revert any batch they are in."""
        self.deceives = False
        """Whether that is to be seen in blocks only, not in calls."""
        self.l1_fee = 0
        self.l1_fee_per_byte = 0
        """What an OP-stack chain says it takes for data; 0: it is another chain."""
        self.refuses_sweeps = self.refuses_policies = False
        self.most_charges = 10**9
        """A batch of more runs out of gas."""
        self._scripted = defaultdict(list)
        self._mining, self._out_of_gas = None, set()
        self._forks = 0
        state = State()
        self.blocks = [FakeBlock(0, self._hash(0, "0x"), "0x" + "00" * 32, BLOCK_TIME, state)]

    # ── What tests do to it ──────────────────────────────────────────────────────────────────────────

    @property
    def head(self):
        """The newest block."""
        return self.blocks[-1]

    @property
    def state(self):
        """The state after the newest block."""
        return self.head.state

    def script(self, method, *answers):
        """The next answers to a method: an exception is raised, `After` one once the call has had its effect.

        None takes back what is left of them.
        """
        self._scripted[method] = [] if answers == (None,) else self._scripted[method] + list(answers)

    def mine(self, *actions, seconds=SECONDS, transactions=True):
        """Make a block of the actions (state → events) and of what waits.

        Args:
            actions: called with the state, in order.
            seconds: since the block before.
            transactions: False leaves the mempool alone.
        """
        parent = self.head
        timestamp = parent.timestamp + seconds
        number = parent.number + 1
        block = FakeBlock(
            number, self._hash(number, parent.hash), parent.hash, timestamp, copy.deepcopy(parent.state)
        )
        block.state.timestamp = timestamp
        for index, action in enumerate(actions):
            self._emit(block, "0x" + keccak(f"{block.hash} {index}".encode()).hex(), action(block.state))
        while transactions and (transaction := self._next_pending(block.state)):
            self._execute(block, transaction)
        self.blocks.append(block)
        return block

    def skip(self, blocks=1, seconds=SECONDS):
        """Let empty blocks pass."""
        for _ in range(blocks):
            self.mine(seconds=seconds, transactions=False)

    def reorg(self, depth, *, transactions=True):
        """Take the newest blocks back; their transactions wait again, or are gone."""
        dropped = self.blocks[-depth:]
        del self.blocks[-depth:]
        self._forks += 1
        for block in dropped:
            for transaction, _ in block.transactions if transactions else ():
                self.pending.setdefault((transaction.sender, transaction.nonce), transaction)

    def send_tokens(self, address, tokens):
        """An action: somebody sends tokens to an address."""

        def action(state):
            state.tokens[address] += tokens
            return [("transfer", address, tokens)]

        return action

    def foreign_transaction(self, sender):
        """An action: somebody else uses a key."""

        def action(state):
            state.nonces[sender] += 1
            return []

        return action

    def sent(self, method):
        """The parameters of every call of a method so far."""
        return [parameters for asked, *parameters in self.asked if asked == method]

    # ── What it answers ──────────────────────────────────────────────────────────────────────────────

    async def call(self, method, *parameters):
        """Answer as a node."""
        self.asked.append((method, *parameters))
        scripted = self._scripted[method]
        answer = scripted.pop(0) if scripted else None
        if isinstance(answer, After):
            getattr(self, "_" + method)(*parameters)
            raise answer.error
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            return answer
        return copy.deepcopy(getattr(self, "_" + method)(*parameters))

    async def batch(self, calls):
        """Answer many, each by itself."""

        async def one(method, parameters):
            try:
                return await self.call(method, *parameters)
            except RpcError as error:
                return error

        return [await one(*call) for call in calls]

    async def close(self):
        """Nothing is open."""

    def _eth_chainId(self):  # noqa: N802 - the node's name for it
        return hex(CHAIN_ID)

    def _eth_getBlockByNumber(self, which, _):  # noqa: N802
        depth = {"latest": 0, "safe": self.safe_depth, "finalized": self.final_depth}.get(which, 0)
        if depth is None:
            reason = "invalid argument 0: hex string without 0x prefix"
            raise RpcError(method="eth_getBlockByNumber", reason=reason, data=None, code=-32602)
        number = max(0, self.head.number - depth) if not which.startswith("0x") else int(which, 16)
        return None if number > self.head.number else self._shown(self.blocks[number])

    def _eth_getBlockByHash(self, hash_, _):  # noqa: N802
        return next((self._shown(block) for block in self.blocks if block.hash == hash_), None)

    def _shown(self, block):
        return {
            "number": hex(block.number),
            "hash": block.hash,
            "parentHash": block.parent,
            "timestamp": hex(block.timestamp),
            "baseFeePerGas": hex(self.base_fee),
        }

    def _eth_getLogs(self, criteria):  # noqa: N802
        if "blockHash" in criteria:
            blocks = [block for block in self.blocks if block.hash == criteria["blockHash"]]
            if not blocks:
                raise RpcError(method="eth_getLogs", reason="unknown block", data=None)
        else:
            first = int(criteria["fromBlock"], 16)
            last = criteria["toBlock"]
            last = self.head.number if last == "latest" else int(last, 16)
            if first > last:
                raise RpcError(method="eth_getLogs", reason="invalid block range params", data=None)
            if last - first + 1 > self.range_limit:
                raise RpcError(method="eth_getLogs", reason="block range is too wide", data=None)
            blocks = self.blocks[first : last + 1]
        topics = criteria.get("topics", [])
        return [
            log
            for block in blocks
            for log in block.logs
            if log["address"] == criteria["address"] and _matches(log["topics"], topics)
        ]

    def _eth_getTransactionCount(self, address, which):  # noqa: N802
        nonce = self.state.nonces[address]
        while which == "pending" and (address, nonce) in self.pending:
            nonce += 1
        return hex(nonce)

    def _eth_getBalance(self, address, _):  # noqa: N802
        return hex(self.wei[address])

    def _eth_maxPriorityFeePerGas(self):  # noqa: N802
        return hex(self.tip)

    def _eth_sendRawTransaction(self, raw):  # noqa: N802
        fields = TypedTransaction.from_bytes(HexBytes(raw)).as_dict()
        transaction = Transaction(
            hash="0x" + keccak(bytes.fromhex(raw[2:])).hex(),
            sender=Account.recover_transaction(raw).lower(),
            nonce=fields["nonce"],
            target="0x" + bytes(fields["to"]).hex(),
            calldata=bytes(fields["data"]),
            max_fee=fields["maxFeePerGas"],
            priority_fee=fields["maxPriorityFeePerGas"],
            gas=fields["gas"],
        )
        key = transaction.sender, transaction.nonce
        before = self.pending.get(key)
        if before is not None and before.hash == transaction.hash:
            raise _refusal("already known")
        if transaction.nonce < self.state.nonces[transaction.sender]:
            raise _refusal("nonce too low")
        if before is not None and (
            10 * transaction.max_fee < 11 * before.max_fee
            or 10 * transaction.priority_fee < 11 * before.priority_fee
        ):
            raise _refusal("replacement transaction underpriced")
        self.pending[key] = transaction
        return transaction.hash

    def _eth_getTransactionReceipt(self, hash_):  # noqa: N802
        for block in self.blocks:
            for transaction, succeeded in block.transactions:
                if transaction.hash == hash_:
                    return {
                        "transactionHash": hash_,
                        "blockNumber": hex(block.number),
                        "blockHash": block.hash,
                        "status": "0x1" if succeeded else "0x0",
                        "gasUsed": hex(transaction.gas if hash_ in self._out_of_gas else 50_000),
                        "logs": [log for log in block.logs if log["transactionHash"] == hash_],
                    }
        return None

    def l1_fee_for(self, transaction):
        """What a transaction's data costs, which is compressed for it, as OP-stack chains do since Fjord."""
        return self.l1_fee_per_byte * len(zlib.compress(transaction))

    def _eth_call(self, call, _):
        data = bytes.fromhex(call["data"][2:])
        if call["to"] == GAS_PRICE_ORACLE:
            fee = self.l1_fee + self.l1_fee_for(decode(["bytes"], data[4:])[0])
            return f"0x{fee:064x}" if fee else "0x"
        if call["to"] == TOKEN:
            (holder,) = decode(["address"], data[4:])
            return "0x" + encode(["uint256"], [self.state.tokens[holder]]).hex()
        try:
            self._run(copy.deepcopy(self.state), data)
        except Reverted as error:
            if str(error) == "OutOfGas":
                raise RpcError(method="eth_call", reason="out of gas", data=None) from None
            raise RpcError(method="eth_call", reason="execution reverted", data=error.data) from None
        return "0x"

    # ── Inside ───────────────────────────────────────────────────────────────────────────────────────

    def _hash(self, number, parent):
        return "0x" + hashlib.sha256(f"{number} {parent} {self._forks}".encode()).hexdigest()

    def _next_pending(self, state):
        for (sender, nonce), transaction in sorted(self.pending.items()):
            if nonce == state.nonces[sender] and transaction.max_fee >= self.base_fee:
                return self.pending.pop((sender, nonce))
        return None

    def _execute(self, block, transaction):
        block.state.nonces[transaction.sender] += 1
        before, self._mining = copy.deepcopy(block.state), block.state
        try:
            emitted = self._run(block.state, transaction.calldata)
        except Reverted as error:
            block.state, succeeded = before, False
            if str(error) == "OutOfGas":
                self._out_of_gas.add(transaction.hash)
        else:
            succeeded = True
            self._emit(block, transaction.hash, emitted)
        block.transactions.append((transaction, succeeded))

    def _run(self, state, calldata):
        selector, arguments = calldata[:4], calldata[4:]
        for signature, run in _FUNCTIONS.items():
            if selector == keccak(signature.encode())[:4]:
                types = vault._argument_types(signature)  # noqa: SLF001
                return run(self, state, *decode(types, arguments))
        raise Reverted

    def _settle(self, state, platform, charges, deadline, signature):
        batch = [
            Charge(account="0x" + a.hex(), id=id_, amount=amount, receipt_hash="0x" + h.hex())
            for a, id_, amount, h in charges
        ]
        if state.timestamp > deadline:
            raise Reverted("DeadlinePassed(uint256,uint256)", ["uint256"] * 2, [deadline, state.timestamp])
        most = state.timestamp + MAX_DEADLINE
        if deadline > most:
            raise Reverted("DeadlineTooFar(uint256,uint256)", ["uint256"] * 2, [deadline, most])
        meter = recover(settlement_digest(Domain(CHAIN_ID, VAULT), platform, batch, deadline), signature)
        if meter not in self.meters:
            raise Reverted("NotAMeter(uint128,address)", ["uint128", "address"], [platform, meter])
        if len(batch) > self.most_charges:
            raise Reverted("OutOfGas")
        if any(charge.id in self.poison for charge in batch) and not (
            self.deceives and state is not self._mining
        ):
            raise Reverted("Panic(uint256)", ["uint256"], [0x11])
        return state.settle(batch)

    def _set_policy(self, state, _platform, account, limits, values):
        if self.refuses_policies:
            raise Reverted("NotPlatformOwner()")
        return state.set_policy("0x" + account.hex(), vault.policy_of(limits, *values))

    def _sweep(self, state, platform, owner, label):
        label = "0x" + label.hex()
        source = vault.deposit_address(VAULT, vault.account_id(platform, owner, label))
        tokens, state.tokens[source] = state.tokens[source], 0
        if tokens == 0 or self.refuses_sweeps:
            raise Reverted("ZeroAmount()")
        return state.deposit(tokens * CREDIT_PER_TOKEN, owner=owner, label=label, payer=source)

    def _emit(self, block, tx_hash, emitted):
        for event in emitted:
            if isinstance(event, tuple):
                _, to, tokens = event
                address = TOKEN
                words = [bytes(32), _word(to), _word(tokens)]
                topics, data = [TRANSFER_TOPIC, *("0x" + w.hex() for w in words[:2])], words[2:]
            else:
                address = VAULT
                name = type(event).__name__
                words = [_word(value) for value in astuple(event)]
                signature = keccak(events.SIGNATURES[type(event)].encode())
                indexed = _INDEXED[name]
                topics = ["0x" + w.hex() for w in (signature, *words[:indexed])]
                data = words[indexed:]
            block.logs.append(
                {
                    "address": address,
                    "topics": topics,
                    "data": "0x" + b"".join(data).hex(),
                    "blockNumber": hex(block.number),
                    "blockHash": block.hash,
                    "logIndex": hex(len(block.logs)),
                    "transactionHash": tx_hash,
                }
            )


_FUNCTIONS = {
    "settle(uint128,(bytes32,uint64,uint96,bytes32)[],uint40,bytes)": FakeChain._settle,  # noqa: SLF001
    "setPolicy(uint128,bytes32,uint8,(uint80,uint80,uint32,uint40))": FakeChain._set_policy,  # noqa: SLF001
    "sweep(uint128,address,bytes32)": FakeChain._sweep,  # noqa: SLF001
}


@dataclass(frozen=True)
class After:
    """A scripted answer that is lost on its way: what was asked has happened."""

    error: Exception


SILENCE = RpcUnavailable(endpoint=FakeChain.url, reason="TimeoutError", method="")


def _refusal(message):
    return RpcError(method="eth_sendRawTransaction", reason=message, data=None)


def _word(value):
    if isinstance(value, str):
        return bytes.fromhex(value[2:]).rjust(32, b"\0")
    return int(value).to_bytes(32, "big")


def _matches(topics, wanted):
    for topic, accepted in zip(topics, wanted, strict=False):
        if accepted is not None and topic not in ([accepted] if isinstance(accepted, str) else accepted):
            return False
    return True
