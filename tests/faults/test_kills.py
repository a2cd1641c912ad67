"""The service killed by SIGKILL at each place where that could lose or double something, then started again."""

import signal

import pytest

# Where, and when it gets there for how many-th time: some are passed while the service starts.
POINTS = [
    "call.held:2",
    "call.answered:2",
    "call.captured:2",
    "lane.planned:2",
    "lane.journalled:2",
    "lane.broadcast:2",
    "lane.mined:2",
    "indexer.read:9",
    "indexer.applied:9",
]


@pytest.mark.parametrize("point", POINTS)
async def test_row_05__service_killed_at_a_step__each_call_charged_once_or_listed_as_lost(site, point):
    """Peers lose charges at shutdown (LiteLLM #38157, #35531), and relayers double-spend (rrelayer #36)."""
    async with site.serve(WATERFALL_FAILPOINT=point) as service:
        caller = await site.open_account(service.url)
        async with caller.calling(service.url):
            assert await service.ended() == -signal.SIGKILL
    async with site.serve() as service:
        assert await caller.call(service.url) == "answered"
        await site.check_books()
