"""An owner whose key has delegated to code by EIP-7702, on a chain that has it: ape's own is older on purpose."""

import pytest
from conftest import CENT, DAY, HOUR, LABEL, NO_EXPIRY, SALT, TOKENS_PER_USD, USD
from eth_account import Account
from typed_data import sign
from web3 import HTTPProvider, Web3

from waterfall.devnet.anvil import Anvil

OWNER = Account.from_key("0x" + "e5" * 32)
THIEF = Account.from_key("0x" + "f6" * 32)


class Chain:
    """Deploys and calls by accounts that the node holds the keys of."""

    def __init__(self, url, project):
        self.web3 = Web3(HTTPProvider(url))
        self.sender, self.project = self.web3.eth.accounts[0], project

    def deploy(self, name, *arguments):
        kind = self.project.get_contract(name).contract_type
        abi = [item.model_dump() for item in kind.abi]
        factory = self.web3.eth.contract(abi=abi, bytecode=kind.deployment_bytecode.bytecode)
        receipt = self.wait(factory.constructor(*arguments).transact({"from": self.sender}))
        return self.web3.eth.contract(receipt["contractAddress"], abi=abi, decode_tuples=True)

    def wait(self, transaction):
        return self.web3.eth.wait_for_transaction_receipt(transaction)

    def send(self, call):
        """Sends it whatever the node thinks of it: whether it went through."""
        return bool(self.wait(call.transact({"from": self.sender, "gas": 1_000_000}))["status"])

    def delegate(self, key, to):
        """Has the key point at code, by a transaction that somebody else sends and pays."""
        chain_id = self.web3.eth.chain_id
        authorization = Account.sign_authorization(
            {
                "chainId": chain_id,
                "address": to,
                "nonce": self.web3.eth.get_transaction_count(key.address),
            },
            key.key,
        )
        payer = Account.create()
        self.wait(self.web3.eth.send_transaction({"from": self.sender, "to": payer.address, "value": 10**18}))
        transaction = {
            "chainId": chain_id,
            "nonce": 0,
            "to": key.address,
            "gas": 200_000,
            "maxFeePerGas": 10**10,
            "maxPriorityFeePerGas": 1,
            "authorizationList": [authorization],
        }
        signed = Account.sign_transaction(transaction, payer.key)
        self.wait(self.web3.eth.send_raw_transaction(signed.raw_transaction))
        assert bytes(self.web3.eth.get_code(key.address)) == b"\xef\x01\x00" + bytes.fromhex(to[2:])


@pytest.mark.parametrize("answer", ["refuses", "reverts", "says yes to a thief"])
async def test_delegated_owner__whatever_its_code_answers__its_plain_key_still_counts(
    tmp_path, project, answer
):
    """A wallet that forgot ERC-1271, or breaks it, must not lock its owner out of the limit on its account. And code
    that speaks for somebody else speaks for the owner, who chose it.
    """
    async with Anvil(tmp_path) as anvil:
        chain = Chain(anvil.rpc_url, project)
        token = chain.deploy("TestUSDC", chain.sender)
        vault = chain.deploy("CreditVault", token.address)
        assert chain.send(vault.functions.registerPlatform(SALT, chain.sender, THIEF.address, DAY))
        platform = vault.functions.platformId(chain.sender, SALT).call()
        account = vault.functions.accountId(platform, OWNER.address, LABEL).call()
        assert chain.send(token.functions.mint(chain.sender, TOKENS_PER_USD))
        assert chain.send(token.functions.approve(vault.address, TOKENS_PER_USD))
        assert chain.send(vault.functions.deposit(platform, OWNER.address, LABEL, TOKENS_PER_USD))
        domain = {
            "name": "Waterfall CreditVault",
            "version": "1",
            "chainId": anvil.chain_id,
            "verifyingContract": vault.address,
        }
        code = (
            chain.deploy("ContractWallet", THIEF.address)
            if answer == "says yes to a thief"
            else chain.deploy("RefusingWallet", answer == "reverts")
        )
        chain.delegate(OWNER, code.address)
        deadline = chain.web3.eth.get_block("latest")["timestamp"] + HOUR

        def change(cap, nonce, key):
            message = {
                "platform": platform,
                "account": account,
                "cap": cap,
                "expiresAt": NO_EXPIRY,
                "nonce": nonce,
                "deadline": deadline,
            }
            return chain.send(
                vault.functions.setAllowanceBySignature(
                    *(platform, OWNER.address, LABEL, cap, NO_EXPIRY, nonce, deadline),
                    sign(key.key, domain, "AllowanceChange", message),
                )
            )

        def allowance():
            view = vault.functions.accountOf(platform, account).call()
            assert (view.balance, view.exitAmount) == (USD, 0)
            assert token.functions.balanceOf(vault.address).call() == TOKENS_PER_USD
            return view.nextCap, view.allowanceNonce

        believed = answer == "says yes to a thief"
        assert change(5 * CENT, 0, THIEF) is believed
        assert allowance() == ((5 * CENT, 1) if believed else (0, 0))
        _, nonce = allowance()
        assert change(7 * CENT, nonce, OWNER)
        assert allowance() == (7 * CENT, nonce + 1)
        assert not change(7 * CENT, nonce, OWNER)
        assert allowance() == (7 * CENT, nonce + 1)
