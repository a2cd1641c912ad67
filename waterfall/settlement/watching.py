"""How a relayer is, for people and for Prometheus."""

from collections.abc import Iterator

from waterfall.chain.endpoint import BUCKETS
from waterfall.metrics import Metric, counter, gauge, histogram
from waterfall.settlement.parts import State
from waterfall.settlement.relayer import Relayer


def families(relayer: Relayer) -> Iterator[Metric]:
    """What can be looked up of it now. Of a lane that another process works on, that one tells."""
    yield from _parts(relayer)
    yield from _lanes(relayer)
    yield from _chain(relayer)
    yield from _nodes(relayer)


def _parts(relayer: Relayer) -> Iterator[Metric]:
    yield gauge(
        "part_state",
        "Whether a part of the relayer is in a state: ok, waiting, retrying, low_on_gas, halted, not_leading.",
        {
            (name, state.value): float(part.state is state)
            for name, part in relayer.parts.items()
            for state in State
        },
        ("part", "state"),
    )


def _lanes(relayer: Relayer) -> Iterator[Metric]:
    facts = {name: lane.facts for name, lane in relayer.lanes.items()}
    ours = {name: of for name, of in facts.items() if relayer.parts[name].state is not State.NOT_LEADING}
    yield gauge(
        "lane_slot_age_seconds",
        "Time since the transaction in flight was seen first; 0: there is none.",
        {(name,): of.slot_age for name, of in ours.items()},
        ("lane",),
    )
    yield gauge(
        "lane_slot_attempts",
        "Attempts at the transaction in flight.",
        {(name,): of.attempts for name, of in ours.items()},
        ("lane",),
    )
    yield gauge(
        "signer_balance_wei",
        "Gas money of a lane's key, when last asked.",
        {(name, of.signer): of.balance for name, of in facts.items() if of.balance is not None},
        ("lane", "signer"),
    )
    yield gauge(
        "signer_batches_left",
        "How many of its dearest transactions a lane's key can pay for, at the fees of then.",
        {(name, of.signer): of.batches_left for name, of in facts.items() if of.batches_left is not None},
        ("lane", "signer"),
    )


def _chain(relayer: Relayer) -> Iterator[Metric]:
    facts = relayer.indexer.facts
    yield counter("reorgs", "Reorgs that this process has followed.", facts.reorgs)
    yield gauge(
        "reorg_deepest_blocks", "Blocks that the deepest one of the last hour took back.", facts.deepest_reorg
    )
    yield gauge("chain_newest_block", "The chain's newest block, as this process saw it.", facts.newest)
    yield gauge("chain_block_interval_seconds", "Time between blocks, lately.", facts.block_interval)


def _nodes(relayer: Relayer) -> Iterator[Metric]:
    endpoints = relayer.endpoints
    yield histogram(
        "rpc_seconds",
        "Time that a node's answers took.",
        BUCKETS,
        {(node.name,): (node.latency.buckets, node.latency.total) for node in endpoints},
        ("endpoint",),
    )
    yield counter(
        "rpc_requests",
        "Requests to a node, by how they ended: answered, refused, limited, failed, wrong_chain.",
        {(node.name, outcome): n for node in endpoints for outcome, n in node.requests.items()},
        ("endpoint", "outcome"),
    )
    yield gauge(
        "rpc_endpoint_healthy",
        "Whether a node's last answer could be used.",
        {(node.name,): float(node.healthy) for node in endpoints},
        ("endpoint",),
    )
