"""What people do beside calling: deposits, limits, exits."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from waterfall.chain import vault as calls
from waterfall.chain.transactions import transact
from waterfall.devnet.deploy import EXIT_DELAY_SECONDS, OWNER, mint, mint_and_deposit
from waterfall.errors import WaterfallError
from waterfall.money import UNITS_PER_TOKEN_BASE_UNIT
from waterfall.signers import LocalSigner
from waterfall.torture.calls import Callers, Payer
from waterfall.torture.plan import DEEPEST_REORG
from waterfall.torture.world import GAS_WEI, TortureFailed, World, key_for

log = structlog.get_logger()

_FIRST_DEPOSIT = {"rich": 5_000_000, "limited": 5_000_000, "owned": 5_000_000, "poor": 3_000}
"""Micro-dollars; a call of the poor holds about 300."""
_POOR_GETS = 2_000
_DEPOSIT_SECONDS, _POLICY_SECONDS, _EXIT_SECONDS = 8.0, 6.0, 20.0
_MINED_SECONDS = 30
_SPENDABLE_SECONDS = 60
_QUIET_SECONDS = 90
_POLICIES: tuple[dict[str, Any], ...] = (
    {},
    {"max_per_charge": "0.0003"},
    {"max_per_charge": "0.01", "max_per_window": "0.05", "window_seconds": 60},
    {"max_per_window": "0.002", "window_seconds": 60},
    {"max_per_charge": "0"},
    {"max_per_charge": "1"},
)


@dataclass
class People:
    """Opens the accounts, and goes on with everything but calls."""

    world: World
    seed: int
    dice: random.Random
    payers: list[Payer] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    async def open(self, count: int) -> Sequence[Payer]:
        """Open and fund accounts of every kind; each can pay once this returns.

        Raises:
            TortureFailed: no deposit arrives.
        """
        kinds = ("rich", "limited", "owned", "poor", "rich", "poor", "limited", "owned")
        for number in range(count):
            kind = kinds[number % len(kinds)]
            label = f"{kind} {number}"
            opened = {"label": label}
            if kind == "owned":
                signer = self._owner(label)
                opened["owner"] = signer.address
                await self.world.rpc.call("anvil_setBalance", signer.address, hex(GAS_WEI))
            account = await self.world.ask("POST", "/api/accounts", opened)
            key = await self.world.ask("POST", f"/api/accounts/{account['id']}/keys", {"name": "torture"})
            payer = Payer(
                account["id"],
                label,
                account["owner"],
                account["label_hash"],
                account["deposit_address"],
                key["key"],
                kind,  # type: ignore[arg-type]
            )
            self.payers.append(payer)
            await self._deposit(payer, _FIRST_DEPOSIT[kind])
        await self.world.rpc.call("anvil_mine", hex(2 * DEEPEST_REORG + 20))
        try:
            async with asyncio.timeout(_SPENDABLE_SECONDS):
                for payer in self.payers:
                    while (await self._account(payer))["available"] == "0.00":
                        await asyncio.sleep(0.2)
        except TimeoutError:
            raise TortureFailed(reason="the first deposits do not arrive") from None
        return self.payers

    async def run(self, callers: Callers) -> None:
        """Go on until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pay_in())
            tasks.create_task(self._set_limits())
            for payer in self._of("owned"):
                tasks.create_task(self._go_in_and_out(payer, callers))

    async def leave(self) -> None:
        """Let an hour pass, and pay every exit out. For when everything has drained."""
        for payer in self._of("owned"):
            found = await self._on_chain(payer)
            if found.exit_amount == 0 and found.balance > 2 * UNITS_PER_TOKEN_BASE_UNIT:
                tokens = found.balance // UNITS_PER_TOKEN_BASE_UNIT // 2
                await self._send(payer, calls.request_exit(*self._of_chain(payer), tokens))
        await self._pass_time()
        for payer in self._of("owned"):
            if (await self._on_chain(payer)).exit_amount:
                await self._send(payer, calls.finalize_exit(*self._of_chain(payer), payer.owner))
                self.counts["exits paid out"] += 1

    def _of(self, kind: str) -> list[Payer]:
        return [payer for payer in self.payers if payer.kind == kind]

    def _owner(self, label: str) -> LocalSigner:
        return key_for(f"{self.seed} {label}")[1]

    def _of_chain(self, payer: Payer) -> tuple[int, str, str]:
        return self.world.deployment.platform, payer.owner, payer.label_hash

    async def _account(self, payer: Payer) -> Any:
        return await self.world.ask("GET", f"/api/accounts/{payer.id}")

    async def _on_chain(self, payer: Payer) -> calls.AccountView:
        return await self.world.vault.account(self.world.deployment.platform, payer.id)

    # ── Deposits ─────────────────────────────────────────────────────────────────────────────────────

    async def _pay_in(self) -> None:
        while True:
            await asyncio.sleep(self.dice.uniform(0.5, 1.5) * _DEPOSIT_SECONDS)
            payer = self.dice.choice([*self._of("poor"), self.dice.choice(self.payers)])
            try:
                async with asyncio.timeout(_MINED_SECONDS):
                    tokens = self.dice.randint(1, 2 * _POOR_GETS)
                    if self.dice.random() < 0.5:  # noqa: PLR2004
                        await self._deposit(payer, tokens)
                        self.counts["deposits"] += 1
                    else:
                        await mint(self.world.rpc, self.world.deployment.token, payer.deposit_address, tokens)
                        self.counts["deposits by address"] += 1
            except (WaterfallError, TimeoutError) as error:
                self.counts["deposits lost with their blocks"] += 1
                log.warning("deposit", reason=repr(error))

    async def _deposit(self, payer: Payer, tokens: int) -> None:
        vault, platform = self.world.deployment.vault, self.world.deployment.platform
        await mint_and_deposit(self.world.rpc, vault, platform, payer.owner, payer.label_hash, tokens)

    # ── Limits ───────────────────────────────────────────────────────────────────────────────────────

    async def _set_limits(self) -> None:
        while self._of("limited"):
            await asyncio.sleep(self.dice.uniform(0.5, 1.5) * _POLICY_SECONDS)
            payer = self.dice.choice(self._of("limited"))
            try:
                await self.world.ask("PUT", f"/api/accounts/{payer.id}/policy", self.dice.choice(_POLICIES))
                self.counts["policies"] += 1
            except WaterfallError as error:
                log.warning("policy", reason=error.message)

    # ── Exits ────────────────────────────────────────────────────────────────────────────────────────

    async def _go_in_and_out(self, payer: Payer, callers: Callers) -> None:
        """Ask for exits under load, take some back, let others mature and be paid out."""
        while True:
            await asyncio.sleep(self.dice.uniform(0.5, 1.5) * _EXIT_SECONDS)
            try:
                await self._one_exit(payer, callers)
            except (WaterfallError, TimeoutError) as error:
                log.warning("exit", account=payer.id, reason=repr(error))
            finally:
                callers.resting.discard(payer.id)

    async def _one_exit(self, payer: Payer, callers: Callers) -> None:
        found = await self._on_chain(payer)
        if found.exit_amount == 0:
            tokens = found.balance // UNITS_PER_TOKEN_BASE_UNIT * self.dice.randint(1, 99) // 100
            if tokens:
                await self._send(payer, calls.request_exit(*self._of_chain(payer), tokens))
                self.counts["exits asked for"] += 1
        elif self.dice.random() < 0.4:  # noqa: PLR2004
            await self._send(payer, calls.cancel_exit(*self._of_chain(payer)))
            self.counts["exits taken back"] += 1
        else:
            callers.resting.add(payer.id)
            await self._wait_until_quiet(payer)
            await self._pass_time()
            await self._send(payer, calls.finalize_exit(*self._of_chain(payer), payer.owner))
            self.counts["exits paid out"] += 1

    async def _wait_until_quiet(self, payer: Payer) -> None:
        """Until all that an account ever did is deeper in the chain than any reorg: an hour is longer than that."""
        async with asyncio.timeout(_QUIET_SECONDS):
            quiet_since = None
            while True:
                shown = await self._account(payer)
                head = int(await self.world.rpc.call("eth_blockNumber"), 16)
                if (shown["held"], shown["unsettled"]) != ("0.00", "0.00"):
                    quiet_since = None
                elif quiet_since is None or head < quiet_since:
                    quiet_since = head
                elif head > quiet_since + DEEPEST_REORG:
                    return
                await asyncio.sleep(0.5)

    async def _pass_time(self) -> None:
        """Let the exit delay pass; no reorg reaches back before it."""
        async with self.world.mining:
            await self.world.rpc.call("evm_increaseTime", EXIT_DELAY_SECONDS + 60)
            await self.world.rpc.call("anvil_mine", hex(DEEPEST_REORG + 1))
        self.counts["hours that passed"] += 1

    async def _send(self, payer: Payer, calldata: bytes) -> None:
        signer = self._owner(payer.label) if payer.kind == "owned" else OWNER
        await transact(
            self.world.rpc, signer, self.world.deployment.vault, calldata, timeout_seconds=_MINED_SECONDS
        )
