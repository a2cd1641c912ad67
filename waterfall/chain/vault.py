"""The vault as Python: calls to read it, calldata to change it.

Source: contracts/interfaces/ICreditVault.sol.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from eth_abi.abi import decode, encode
from eth_abi.exceptions import DecodingError

from waterfall.chain import artifacts
from waterfall.chain.events import Event, Position
from waterfall.chain.events import decode as decode_log
from waterfall.chain.rpc import Rpc, RpcError
from waterfall.errors import ChainError
from waterfall.keccak import keccak
from waterfall.types import Allowance, Charge, Policy, UsageReceipt

LIMIT_PER_CHARGE, LIMIT_PER_WINDOW, LIMIT_EXPIRY = 1, 2, 4
MAX_CHARGES = 1000
_SETTLE_GAS, _SETTLE_GAS_EACH = 150_000, 24_000
MOST_CHARGES = min(MAX_CHARGES, (2**24 - _SETTLE_GAS) // _SETTLE_GAS_EACH)
"""So many fit into one transaction: nodes take none of more than 2**24 gas. Source: EIP-7825."""

_UNREADABLE = (DecodingError, ValueError, TypeError, LookupError)
"""What decoding raises where a node sends something else."""

_POLICY = "(uint80,uint80,uint32,uint40)"
_ALLOWANCE = "(uint96,uint96,uint40)"
_RECEIPT = "(uint128,bytes32,uint64,bytes32,bytes32,string,uint64,uint64,uint64,uint64,bytes32,bytes32,uint96,uint40,bool)"


@cache
def _selector(signature: str) -> bytes:
    return keccak(signature.encode())[:4]


def _call(signature: str, *arguments: Any) -> bytes:
    return _selector(signature) + encode(_argument_types(signature), _values(signature, arguments))


@cache
def _argument_types(signature: str) -> tuple[str, ...]:
    """Top-level types of a function's signature or of a struct's."""
    types, depth, word = [], 0, ""
    for character in signature[signature.index("(") + 1 : -1]:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            types.append(word)
            word = ""
        else:
            word += character
    return tuple([*types, word] if word else types)


def _values(signature: str, arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Arguments as eth_abi takes them: bytes for our hex strings of 32 bytes; addresses stay text."""
    types = _argument_types(signature)
    return tuple(
        _bytes(value) if type_ == "bytes32" else value for type_, value in zip(types, arguments, strict=True)
    )


def _bytes(hex_string: str) -> bytes:
    return bytes.fromhex(hex_string[2:])


# ── Calldata ─────────────────────────────────────────────────────────────────────────────────────────


def settle(platform: int, charges: Sequence[Charge], deadline: int, meter_signature: bytes) -> bytes:
    """Calldata of `settle`, joined word by word: eth_abi takes 60 times as long for 500 charges."""
    head = 4 * 32
    body = b"".join(
        bytes.fromhex(charge.account[2:])
        + charge.id.to_bytes(32, "big")
        + charge.amount.to_bytes(32, "big")
        + bytes.fromhex(charge.receipt_hash[2:])
        for charge in charges
    )
    return b"".join(
        (
            _selector("settle(uint128,(bytes32,uint64,uint96,bytes32)[],uint40,bytes)"),
            platform.to_bytes(32, "big"),
            head.to_bytes(32, "big"),
            deadline.to_bytes(32, "big"),
            (head + 32 + len(body)).to_bytes(32, "big"),
            len(charges).to_bytes(32, "big"),
            body,
            len(meter_signature).to_bytes(32, "big"),
            meter_signature.ljust(96, b"\0"),
        )
    )


def settle_gas(charges: int) -> int:
    """A gas limit no batch reaches: measured worst 20,022 a charge, of limited accounts that draw on their exits."""
    return _SETTLE_GAS + _SETTLE_GAS_EACH * charges


def set_policy(platform: int, account: str, policy: Policy) -> bytes:
    """Calldata of `setPolicy`."""
    limits = (
        LIMIT_PER_CHARGE * (policy.max_per_charge is not None)
        | LIMIT_PER_WINDOW * (policy.max_per_window is not None)
        | LIMIT_EXPIRY * (policy.expires_at is not None)
    )
    values = (
        policy.max_per_charge or 0,
        policy.max_per_window or 0,
        policy.window_seconds or 0,
        policy.expires_at or 0,
    )
    return _call(f"setPolicy(uint128,bytes32,uint8,{_POLICY})", platform, account, limits, values)


SET_POLICY_GAS = 150_000


def sweep(platform: int, owner: str, label_hash: str) -> bytes:
    """Calldata of `sweep`."""
    return _call("sweep(uint128,address,bytes32)", platform, owner, label_hash)


SWEEP_GAS = 300_000


def deposit(platform: int, owner: str, label_hash: str, tokens: int) -> bytes:
    """Calldata of `deposit`; `tokens` in token base units."""
    return _call("deposit(uint128,address,bytes32,uint256)", platform, owner, label_hash, tokens)


def request_exit(platform: int, owner: str, label_hash: str, tokens: int) -> bytes:
    """Calldata of `requestExit`; `tokens` in token base units."""
    return _call("requestExit(uint128,address,bytes32,uint256)", platform, owner, label_hash, tokens)


def cancel_exit(platform: int, owner: str, label_hash: str) -> bytes:
    """Calldata of `cancelExit`."""
    return _call("cancelExit(uint128,address,bytes32)", platform, owner, label_hash)


def finalize_exit(platform: int, owner: str, label_hash: str, to: str) -> bytes:
    """Calldata of `finalizeExit`; `to` gets the tokens."""
    return _call("finalizeExit(uint128,address,bytes32,address)", platform, owner, label_hash, to)


def register_platform(salt: str, payout: str, meter: str, exit_delay: int) -> bytes:
    """Calldata of `registerPlatform`; `exit_delay` in seconds."""
    return _call("registerPlatform(bytes32,address,address,uint32)", salt, payout, meter, exit_delay)


# ── Ids ──────────────────────────────────────────────────────────────────────────────────────────────


def account_id(platform: int, owner: str, label_hash: str) -> str:
    """`keccak256(abi.encode(platform, owner, label))`."""
    return (
        "0x" + keccak(encode(("uint128", "address", "bytes32"), (platform, owner, _bytes(label_hash)))).hex()
    )


def platform_id(registrant: str, salt: str) -> int:
    """`uint128(uint256(keccak256(abi.encode(registrant, salt))))`."""
    return int.from_bytes(keccak(encode(("address", "bytes32"), (registrant, _bytes(salt))))[16:], "big")


_CLONE_HEAD = bytes.fromhex("3d602d80600a3d3981f3363d3d373d3d3d363d73")
_CLONE_TAIL = bytes.fromhex("5af43d82803e903d91602b57fd5bf3")
_ACCOUNT_SALT_TAG = keccak(b"waterfall.deposit-address.account")


def deposit_address(vault: str, account: str) -> str:
    """CREATE2 address of an account's deposit address: an EIP-1167 clone of the first contract the vault made.

    Sources: EIP-1014, EIP-1167.
    """
    implementation = keccak(b"\xd6\x94" + bytes.fromhex(vault[2:]) + b"\x01")[12:]  # RLP of (vault, nonce 1)
    code_hash = keccak(_CLONE_HEAD + implementation + _CLONE_TAIL)
    salt = keccak(_ACCOUNT_SALT_TAG + _bytes(account))
    return "0x" + keccak(b"\xff" + bytes.fromhex(vault[2:]) + salt + code_hash)[12:].hex()


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class PlatformView:
    """A platform as the vault holds it; `earnings` in credit units, `exit_delay` in seconds."""

    owner: str
    payout: str
    exit_delay: int
    earnings: int
    pending_owner: str
    """The zero address where the platform is not offered to anybody."""


@dataclass(frozen=True, slots=True)
class Meter:
    """A meter's validity, block time; zero where the interface says so."""

    added_at: int
    retired_at: int
    compromised_since: int


@dataclass(frozen=True, slots=True)
class AccountView:
    """An account as the vault holds it; amounts in credit units."""

    balance: int
    spent_in_window: int
    window: int
    entries: int
    limits: int
    policy: Policy
    exit_amount: int
    exit_matures_at: int
    allowance: Allowance | None
    """As it binds on the chain now."""
    allowance_spent: int
    next_allowance: Allowance | None
    """What binds on the chain from `allowance_changes_at` on."""
    allowance_changes_at: int
    """0 where no change is under way."""
    allowance_nonce: int
    consents_from: int
    """Block time from which a meter's consent to an exit counts; 0: always."""


@dataclass(frozen=True, slots=True)
class ReceiptCheck:
    """What the vault says of a receipt and its signature."""

    digest: str
    signer: str
    valid_at_issue: bool
    valid_now: bool
    used: bool


class Vault:
    """One vault on one chain, for reading."""

    def __init__(self, rpc: Rpc, address: str) -> None:
        self.rpc = rpc
        self.address = address

    async def platform(self, platform: int) -> PlatformView:
        """The platform; its owner is the zero address where there is none."""
        return PlatformView(
            *await self._read("platformOf(uint128)", ("(address,address,uint32,uint96,address)",), platform)
        )

    async def meter(self, platform: int, meter: str) -> Meter:
        """A key's validity as a meter of the platform."""
        return Meter(
            *await self._read("meterOf(uint128,address)", ("(uint40,uint40,uint40)",), platform, meter)
        )

    async def account(self, platform: int, account: str, block: str = "latest") -> AccountView:
        """The account at a block ("latest", or a hex number)."""
        values = await self._read(
            "accountOf(uint128,bytes32)",
            (
                f"(uint96,uint80,uint32,uint40,uint8,{_POLICY},uint96,uint40,{_ALLOWANCE},uint96,uint40,uint40,uint64,uint40)",
            ),
            platform,
            account,
            block=block,
        )
        balance, spent, window, entries, limits, policy, exit_amount, exit_matures_at, *owners = values
        (cap, allowance_spent, expires_at), next_cap, next_expires_at, changes_at, nonce, consents_from = (
            owners
        )
        return AccountView(
            balance=balance,
            spent_in_window=spent,
            window=window,
            entries=entries,
            limits=limits,
            policy=policy_of(limits, *policy),
            exit_amount=exit_amount,
            exit_matures_at=exit_matures_at,
            allowance=allowance_of(cap, expires_at),
            allowance_spent=allowance_spent,
            next_allowance=allowance_of(next_cap, next_expires_at) if changes_at else None,
            allowance_changes_at=changes_at,
            allowance_nonce=nonce,
            consents_from=consents_from,
        )

    async def token(self) -> str:
        """Address of the token that backs all credit."""
        return str(await self._read("token()", ("address",)))

    async def verify_receipt(self, receipt: UsageReceipt, signature: bytes) -> ReceiptCheck:
        """The vault's own check of a receipt."""
        fields = _values(_RECEIPT, receipt.model_dump().values())
        digest, *rest = await self._read(
            f"verifyReceipt({_RECEIPT},bytes)", ("(bytes32,address,bool,bool,bool)",), fields, signature
        )
        return ReceiptCheck("0x" + digest.hex(), *rest)

    async def logs(self, **criteria: Any) -> list[tuple[Position, Event]]:
        """The vault's events, by `fromBlock` and `toBlock`, or `blockHash`, and `topics`.

        There are nodes that answer with no logs for blocks they do not have (besu#8007, go-ethereum#24078): an answer
        counts only from one that shows the block, or the last of them, in the same breath.

        Raises:
            RpcError: the node does not answer for so many blocks.
            ChainError: it does not have them, or its answer cannot be read or is about others.
        """
        hash_, last = criteria.get("blockHash"), criteria.get("toBlock", "latest")
        asked = (
            ("eth_getBlockByNumber", (last, False))
            if hash_ is None
            else ("eth_getBlockByHash", (hash_, False))
        )
        block, found = await self.rpc.batch(
            [asked, ("eth_getLogs", ({"address": self.address, **criteria},))]
        )
        for answer in (block, found):
            if isinstance(answer, RpcError):
                raise answer
        if block is None:
            raise ChainError(
                reason=f"the node that was asked for the logs of block {hash_ or last} does not have it"
            )
        try:
            for log in found:
                if log["address"].lower() != self.address or log["blockHash"] != (hash_ or log["blockHash"]):
                    raise ChainError(
                        reason=f"a node answered with other logs than those of {self.address} asked for"
                    )
            return [decoded for log in found if (decoded := decode_log(log)) is not None]
        except _UNREADABLE as error:
            raise ChainError(reason=f"the logs of {self.address} cannot be read: {error!r}") from error

    async def _read(
        self, signature: str, types: tuple[str, ...], *arguments: Any, block: str = "latest"
    ) -> Any:
        call: Mapping[str, str] = {"to": self.address, "data": "0x" + _call(signature, *arguments).hex()}
        result = await self.rpc.call("eth_call", call, block)
        try:
            return decode(types, bytes.fromhex(result[2:]))[0]
        except _UNREADABLE:
            raise ChainError(
                reason=f"there is no CreditVault at {self.address}: {signature} answers {result!r:.80}"
            ) from None


def refusal(data: Any) -> str | None:
    """A revert in the words of the vault's interface, such as `UnknownPlatform(7)`; None where it is another's."""
    for error in artifacts.load("CreditVault").abi:
        if error["type"] == "error":
            types = [argument["type"] for argument in error["inputs"]]
            selector = "0x" + _selector(f"{error['name']}({','.join(types)})").hex()
            if str(data).startswith(selector):
                try:
                    values = decode(types, bytes.fromhex(str(data)[10:]))
                except _UNREADABLE:
                    return None
                return f"{error['name']}({', '.join(map(str, values))})"
    return None


def policy_of(
    limits: int, max_per_charge: int, max_per_window: int, window_seconds: int, expires_at: int
) -> Policy:
    """A policy from the vault's flags and values."""
    windowed = limits & LIMIT_PER_WINDOW
    return Policy(
        max_per_charge=max_per_charge if limits & LIMIT_PER_CHARGE else None,
        max_per_window=max_per_window if windowed else None,
        window_seconds=window_seconds if windowed else None,
        expires_at=expires_at if limits & LIMIT_EXPIRY else None,
    )


NO_CAP, NO_EXPIRY = 2**96 - 1, 2**40 - 1


def allowance_of(cap: int, expires_at: int) -> Allowance | None:
    """An allowance from the vault's values; None where they limit nothing."""
    return None if (cap, expires_at) == (NO_CAP, NO_EXPIRY) else Allowance(cap=cap, expires_at=expires_at)
