import pytest
import rlp
from eth_abi.abi import encode
from eth_hash.auto import keccak
from hypothesis import given
from hypothesis import strategies as st
from making import ACCOUNT, METER, PLATFORM, TOKEN, USD, VAULT, policy_words, sign, word
from web3 import Web3

from waterfall.chain import artifacts, token, vault
from waterfall.chain.vault import AccountView, Meter, PlatformView, ReceiptCheck, Vault
from waterfall.errors import ChainError
from waterfall.ledger.books import Hold
from waterfall.types import Allowance, Charge, Policy

OWNER = "0x" + "0e" * 20
ABI = list(artifacts.load("CreditVault").abi)
CONTRACT = Web3().eth.contract(abi=ABI)
TOKEN_CONTRACT = Web3().eth.contract(abi=list(artifacts.load("TestUSDC").abi))

WORDS = st.binary(min_size=32, max_size=32).map(lambda data: "0x" + data.hex())
ADDRESSES = st.binary(min_size=20, max_size=20).map(lambda data: "0x" + data.hex())
PLATFORMS = st.integers(0, 2**128 - 1)
CHARGES = st.builds(
    Charge, account=WORDS, id=st.integers(0, 2**64 - 1), amount=st.integers(0, 2**96 - 1), receipt_hash=WORDS
)
POLICIES = st.builds(
    Policy,
    max_per_charge=st.none() | st.integers(0, 2**80 - 1),
    expires_at=st.none() | st.integers(0, 2**40 - 1),
).flatmap(
    lambda policy: (
        st.just(policy)
        | st.builds(
            lambda most, seconds: Policy(
                **{**policy.model_dump(), "max_per_window": most, "window_seconds": seconds}
            ),
            st.integers(0, 2**80 - 1),
            st.integers(60, 2**32 - 1),
        )
    )
)


def calldata(function, *arguments, contract=CONTRACT):
    arguments = [Web3.to_checksum_address(a) if isinstance(a, str) and len(a) == 42 else a for a in arguments]
    return bytes.fromhex(contract.encode_abi(function, arguments)[2:])


# ── Calldata ─────────────────────────────────────────────────────────────────────────────────────────


@given(
    PLATFORMS, st.lists(CHARGES, max_size=4), st.integers(0, 2**40 - 1), st.binary(min_size=65, max_size=65)
)
def test_settle__any_batch__calldata_of_web3(platform, charges, deadline, signature):
    rows = [(c.account, c.id, c.amount, c.receipt_hash) for c in charges]
    expected = calldata("settle", platform, rows, deadline, signature)
    assert vault.settle(platform, charges, deadline, signature) == expected


@given(PLATFORMS, WORDS, POLICIES)
def test_set_policy__any_policy__calldata_of_web3(platform, account, policy):
    limits, *values = policy_words(policy)
    expected = calldata("setPolicy", platform, account, limits, values)
    assert vault.set_policy(platform, account, policy) == expected
    assert vault.policy_of(limits, *values) == policy


@given(PLATFORMS, ADDRESSES, WORDS, st.integers(0, 2**256 - 1))
def test_calldata__of_everything_else__is_that_of_web3(platform, owner, label, tokens):
    assert vault.sweep(platform, owner, label) == calldata("sweep", platform, owner, label)
    assert vault.deposit(platform, owner, label, tokens) == calldata(
        "deposit", platform, owner, label, tokens
    )
    delay = tokens % 2**32
    expected = calldata("registerPlatform", label, owner, owner, delay)
    assert vault.register_platform(label, owner, owner, delay) == expected
    assert token.approve(owner, tokens) == calldata("approve", owner, tokens, contract=TOKEN_CONTRACT)


def test_limits__compiled_contract__same_flags_and_sizes():
    names = {item["name"] for item in ABI if item["type"] == "function"}
    assert {"LIMIT_PER_CHARGE", "LIMIT_PER_WINDOW", "LIMIT_EXPIRY", "MAX_CHARGES"} <= names
    assert (vault.LIMIT_PER_CHARGE, vault.LIMIT_PER_WINDOW, vault.LIMIT_EXPIRY) == (1, 2, 4)
    assert vault.MAX_CHARGES == 1000


def test_settle_gas__largest_batch__fits_a_block():
    assert vault.settle_gas(vault.MOST_CHARGES) <= 2**24 < vault.settle_gas(vault.MOST_CHARGES + 1)
    assert vault.settle_gas(1) > 56_000
    assert vault.settle_gas(500) > 500 * 20_022 * 1.1  # measured: limited accounts that draw on their exits


# ── Ids ──────────────────────────────────────────────────────────────────────────────────────────────


@given(PLATFORMS, ADDRESSES, WORDS)
def test_ids__any_owner_and_label__hashes_of_their_encoding(platform, owner, label):
    encoded = encode(["uint128", "address", "bytes32"], [platform, owner, bytes.fromhex(label[2:])])
    assert vault.account_id(platform, owner, label) == "0x" + keccak(encoded).hex()
    encoded = encode(["address", "bytes32"], [owner, bytes.fromhex(label[2:])])
    assert vault.platform_id(owner, label) == int.from_bytes(keccak(encoded), "big") % 2**128


@given(ADDRESSES, WORDS)
def test_deposit_address__any_account__create2_of_a_minimal_proxy(contract, account):
    first_made = keccak(rlp.encode([bytes.fromhex(contract[2:]), 1]))[12:]
    code = bytes.fromhex("3d602d80600a3d3981f3363d3d373d3d3d363d73") + first_made
    code += bytes.fromhex("5af43d82803e903d91602b57fd5bf3")
    tag = keccak(b"waterfall.deposit-address.account")
    salt = keccak(encode(["bytes32", "bytes32"], [tag, bytes.fromhex(account[2:])]))
    expected = keccak(b"\xff" + bytes.fromhex(contract[2:]) + salt + keccak(code))[12:]
    assert vault.deposit_address(contract, account) == "0x" + expected.hex()


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────


class Answering:
    """A node that answers every `eth_call` with the same words, and keeps what it was asked."""

    def __init__(self, types, values):
        self._result = "0x" + encode(types, values).hex()
        self.asked = []

    async def call(self, method, *parameters):
        self.asked.append((method, *parameters))
        return self._result


def asked(node):
    ((method, call, block),) = node.asked
    assert method == "eth_call"
    assert call["to"] == VAULT
    return bytes.fromhex(call["data"][2:]), block


async def test_platform__answer__is_read_by_name():
    node = Answering(
        ["(address,address,uint32,uint96,address)"], [(VAULT, TOKEN, 3600, 20_000_000 * USD, OWNER)]
    )
    expected = PlatformView(VAULT, TOKEN, 3600, 20_000_000 * USD, OWNER)
    assert await Vault(node, VAULT).platform(PLATFORM) == expected
    assert asked(node) == (calldata("platformOf", PLATFORM), "latest")


async def test_meter__answer__is_read_by_name():
    node = Answering(["(uint40,uint40,uint40)"], [(1, 2, 3)])
    assert await Vault(node, VAULT).meter(PLATFORM, METER.address) == Meter(1, 2, 3)
    assert asked(node) == (calldata("meterOf", PLATFORM, METER.address), "latest")


NO_ALLOWANCE = (2**96 - 1, 0, 2**40 - 1)


def answering_account(values):
    types = "uint96,uint80,uint32,uint40,uint8,(uint80,uint80,uint32,uint40),uint96,uint40"
    return Answering([f"({types},(uint96,uint96,uint40),uint96,uint40,uint40,uint64,uint40)"], [values])


async def test_account__allowance_that_changes__both_are_read():
    node = answering_account((7, 0, 0, 1, 0, (0, 0, 0, 0), 0, 0, (10 * USD, 3, 99), USD, 88, 77, 5, 0))
    view = await Vault(node, VAULT).account(PLATFORM, ACCOUNT)
    assert (view.allowance, view.allowance_spent) == (Allowance(cap=10 * USD, expires_at=99), 3)
    assert (view.next_allowance, view.allowance_changes_at) == (Allowance(cap=USD, expires_at=88), 77)
    assert view.allowance_nonce == 5


async def test_account__removed_allowance__is_none():
    node = answering_account((7, 0, 0, 1, 0, (0, 0, 0, 0), 0, 0, (2**96 - 1, 3, 2**40 - 1), USD, 88, 0, 5, 0))
    view = await Vault(node, VAULT).account(PLATFORM, ACCOUNT)
    assert (view.allowance, view.allowance_spent, view.next_allowance) == (None, 3, None)


@pytest.mark.parametrize("limits", range(8))
async def test_account__answer__only_flagged_limits_exist(limits):
    node = answering_account(
        (20_000_000 * USD, 2, 3, 4, limits, (0, 0, 60, 0), 5, 6, NO_ALLOWANCE, 0, 0, 0, 0, 9)
    )
    view = await Vault(node, VAULT).account(PLATFORM, ACCOUNT, block="0x10")
    windowed = bool(limits & 2)
    expected = Policy(
        max_per_charge=0 if limits & 1 else None,
        max_per_window=0 if windowed else None,
        window_seconds=60 if windowed else None,
        expires_at=0 if limits & 4 else None,
    )
    assert view == AccountView(20_000_000 * USD, 2, 3, 4, limits, expected, 5, 6, None, 0, None, 0, 0, 9)
    assert asked(node) == (calldata("accountOf", PLATFORM, ACCOUNT), "0x10")


async def test_token__answer__is_an_address():
    node = Answering(["address"], [TOKEN])
    assert await Vault(node, VAULT).token() == TOKEN
    assert asked(node) == (calldata("token"), "latest")


@pytest.mark.parametrize("model", ["gpt-4o-mini", "", "m" * 66, "0x" + "ab" * 32, "模型"])
async def test_verify_receipt__any_models_name__calldata_of_web3(model):
    signed = sign(Hold(1, 2**32 + 1, "ab" * 16, ACCOUNT, 10, 0), 5, model=model)
    node = Answering(["(bytes32,address,bool,bool,bool)"], [(b"\x01" * 32, METER.address, True, False, True)])
    signature = bytes.fromhex(signed.signature[2:])
    check = await Vault(node, VAULT).verify_receipt(signed.receipt, signature)
    assert check == ReceiptCheck("0x" + "01" * 32, METER.address, True, False, True)
    assert asked(node)[0] == calldata("verifyReceipt", tuple(signed.receipt.model_dump().values()), signature)


async def test_balance_of__answer__token_base_units():
    node = Answering(["uint256"], [2**200])
    assert await token.balance_of(node, TOKEN, VAULT) == 2**200
    ((_, call, _),) = node.asked
    assert call["to"] == TOKEN
    assert bytes.fromhex(call["data"][2:]) == calldata("balanceOf", VAULT, contract=TOKEN_CONTRACT)


async def test_logs__unknown_events__are_left_out():
    unknown = {"topics": [word("EIP712DomainChanged()")], "data": "0x", "address": VAULT, "blockHash": "0xb"}
    node = Telling({"hash": "0xb"}, [unknown])
    assert await Vault(node, VAULT).logs(blockHash="0xb") == []
    assert node.asked == [
        ("eth_getBlockByHash", ("0xb", False)),
        ("eth_getLogs", ({"address": VAULT, "blockHash": "0xb"},)),
    ]


@pytest.mark.parametrize("criteria", [{"blockHash": "0xb"}, {"fromBlock": "0x1", "toBlock": "0x2"}])
async def test_logs__node_does_not_have_the_block__no_logs_are_not_believed(criteria):
    """Besu and geth have answered so (besu#8007, go-ethereum#24078)."""
    with pytest.raises(ChainError, match="does not have it"):
        await Vault(Telling(None, []), VAULT).logs(**criteria)


@pytest.mark.parametrize("changed", [{"address": "0x" + "11" * 20}, {"blockHash": "0xa"}])
async def test_logs__of_something_else__are_not_believed(changed):
    log = {"topics": [word("EIP712DomainChanged()")], "data": "0x", "address": VAULT, "blockHash": "0xb"}
    with pytest.raises(ChainError, match="other logs"):
        await Vault(Telling({"hash": "0xb"}, [log | changed]), VAULT).logs(blockHash="0xb")


class Telling:
    """A node that shows this block, and these logs."""

    def __init__(self, block, logs):
        self.answers, self.asked = [block, logs], None

    async def batch(self, calls):
        self.asked = calls
        return self.answers


@pytest.mark.parametrize("answer", ["0x", "0x00", "0xzz", "hello", 5, None, [], {}])
async def test_read__no_vault_there__is_a_chain_error(answer):
    class Node:
        async def call(self, *_):
            return answer

    with pytest.raises(ChainError, match=f"there is no CreditVault at {VAULT}"):
        await Vault(Node(), VAULT).token()


@pytest.mark.parametrize("answer", [5, None, [5], [{}], ["x"]])
async def test_logs__garbage__is_a_chain_error(answer):
    with pytest.raises(ChainError, match=f"the logs of {VAULT} cannot be read"):
        await Vault(Telling({"hash": "0xb"}, answer), VAULT).logs(blockHash="0xb")


def test_refusal__custom_errors__are_named():
    data = keccak(b"ExceedsBalance(uint256,uint256)")[:4] + encode(["uint256", "uint256"], [3, 2])
    assert vault.refusal("0x" + data.hex()) == "ExceedsBalance(3, 2)"
    assert vault.refusal("0x" + keccak(b"ZeroAmount()")[:4].hex()) == "ZeroAmount()"


@pytest.mark.parametrize(
    "data", [None, 5, "0x", "0x12345678", "0x" + keccak(b"ExceedsBalance(uint256,uint256)")[:4].hex()]
)
def test_refusal__of_others__is_none(data):
    assert vault.refusal(data) is None
