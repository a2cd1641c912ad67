"""Whether new calls are refused: what the one process that leads the gate says, for all."""

from waterfall.ledger import shared
from waterfall.ledger.shared import Shared


class Gate:
    """What one process knows of it. In doubt calls are refused: by what it says itself, or by what all are told.

    Only what all were told before it spoke last does not count any more: that is its own older word, or its
    predecessor's.
    """

    def __init__(self) -> None:
        self._said: str | None = None
        self._told: str | None = None
        self._is_told_older = False
        """Whether what all were told, as far as known, is older than what was said."""
        self._news: dict[str, str | None] = {}

    @property
    def refusal(self) -> str | None:
        """Why new calls are refused; None: they are not."""
        return self._said if self._is_told_older else self._said or self._told

    def refuse(self, reason: str | None) -> None:
        """Refuse new calls from now on, in all processes, with a reason; None: no more.

        For the process that leads the gate: what it says replaces what was said before, by whomever.
        """
        if (reason, reason) != (self._said, self._told):
            self._news, self._is_told_older = {shared.REFUSAL: reason}, True
        self._said = reason

    def step_down(self) -> None:
        """This process does not lead the gate: what all are told is what counts."""
        self._said, self._news, self._is_told_older = None, {}, False

    def take_news(self) -> dict[str, str | None]:
        """What to tell all, before they are asked again what they were told; once."""
        news, self._news = self._news, {}
        return news

    def learn(self, known: Shared) -> None:
        """Know what all were told; what was said meanwhile is newer than that."""
        if not self._news:
            self._told, self._is_told_older = known.refusal, False
