"""`waterfall accuracy`: what was charged, held against what the providers' own usage comes to."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.table import Table

from waterfall.cli.accounts import Key, Url
from waterfall.cli.api import Api, connect
from waterfall.cli.output import Json, command, err, facts, show
from waterfall.errors import VerificationFailed
from waterfall.gateway.wire import ReceiptView
from waterfall.metering import prices
from waterfall.metering.usage import UsageUnreadable, read
from waterfall.money import format_usd

_PAGE = 1000
_SHOWN = 20
"""Of the calls that differ."""


@dataclass
class Accuracy:
    """Calls by how they ended, and their money; amounts in credit units."""

    running: int = 0
    released: int = 0
    """They cost nothing."""
    lost: int = 0
    """They may have cost something that nobody can meter; nothing was charged."""
    complete: int = 0
    """Charged by the provider's own usage."""
    incomplete: int = 0
    """Charged for what was provably delivered, as the provider's usage never came."""
    given: int = 0
    """Charged an amount that the platform gave."""
    usage_removed: int = 0
    """Their usage is kept no more, so nothing can be recomputed."""
    charged: int = 0
    """For the complete ones, what is beyond the hold, and so the platform's loss, included."""
    by_usage: int = 0
    """What the providers' usage comes to at the prices of the receipts."""
    beyond_hold: int = 0
    charged_incomplete: int = 0
    differing: list[str] = field(default_factory=list)
    """Receipts whose amount is not what their usage comes to."""

    @property
    def difference(self) -> int:
        """Charged and not used, or the other way round where it is negative."""
        return self.charged - self.by_usage

    def add(self, call: ReceiptView) -> None:
        """Count a call, and recompute what it costs."""
        signed = call.receipt
        if signed is None:
            counted = {"held": "running", "lost": "lost"}.get(call.status, "released")
            setattr(self, counted, getattr(self, counted) + 1)
            return
        price = signed.receipt.amount + call.excess
        if signed.rate_card is None or signed.surface is None:
            self.given += 1
        elif signed.usage_removed:
            self.usage_removed += 1
        elif not signed.receipt.complete:
            self.incomplete += 1
            self.charged_incomplete += price
            self._compare(call.id, price, prices.amount(signed.metered, signed.rate_card))
        else:
            self.complete += 1
            self.charged += price
            self.beyond_hold += call.excess
            try:
                used = prices.amount(read(signed.surface, signed.usage), signed.rate_card)
            except UsageUnreadable:
                used = 0
            self.by_usage += used
            self._compare(call.id, price, used)

    def _compare(self, receipt: str, price: int, recomputed: int) -> None:
        if price != recomputed:
            self.differing.append(receipt)


@command
async def accuracy(
    account: Annotated[str | None, typer.Option(help="Whose calls; left out: everybody's.")] = None,
    since: Annotated[int, typer.Option(help="Unix second from which they were made.")] = 0,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Recompute every charge from the provider's own usage and the prices of its receipt.

    Nothing of the gateway's arithmetic is taken on trust, but for the usage objects. Exit code 1 if one differs.
    """
    with err.status("Reading calls …") as status:
        seen = await _tally(connect(url, key), account, since * 1000, lambda n: status.update(f"{n} calls …"))
    shown = asdict(seen) | {"difference": seen.difference}
    amounts = ("charged", "by_usage", "beyond_hold", "charged_incomplete", "difference")
    shown |= {name: format_usd(shown[name]) for name in amounts}
    show(shown, as_json, _table)
    if seen.differing:
        raise VerificationFailed(reason=f"{len(seen.differing)} charges are not what their usage comes to")


async def _tally(api: Api, account: str | None, since: int, tell: Any) -> Accuracy:
    seen, before, number = Accuracy(), None, 0
    while True:
        asked = {"account": account, "before": before, "limit": _PAGE}
        path = "/api/calls?" + urlencode({name: value for name, value in asked.items() if value is not None})
        page = [
            ReceiptView.model_validate(call) for call in await api.request(list[ReceiptView], "GET", path)
        ]
        for call in page:
            if call.created_at < since:
                return seen
            seen.add(call)
        number += len(page)
        tell(number)
        if len(page) < _PAGE:
            return seen
        before = page[-1].charge_id


def _table(seen: Any) -> Table:
    calls = sum(
        seen[name]
        for name in ("complete", "incomplete", "given", "usage_removed", "lost", "released", "running")
    )
    return facts(
        "Accuracy",
        [
            ("calls", calls),
            ("complete", seen["complete"]),
            ("incomplete", f"{seen['incomplete']}, charged {seen['charged_incomplete']} USD"),
            ("amounts given by the platform", seen["given"]),
            ("usage kept no more", seen["usage_removed"]),
            ("lost", seen["lost"]),
            ("released", seen["released"]),
            ("running", seen["running"]),
            ("charged", f"{seen['charged']} USD, of which {seen['beyond_hold']} USD beyond holds"),
            ("by the providers' usage", f"{seen['by_usage']} USD"),
            ("difference", f"{seen['difference']} USD"),
            ("differing", ", ".join(seen["differing"][:_SHOWN]) or "none"),
        ],
    )
