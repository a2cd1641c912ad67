import json
from pathlib import Path

import pytest

from waterfall.chain import refusals
from waterfall.chain.refusals import Broadcast, Fault, Refusal, classify, fault, has_no_block_yet, refusal

SAID = json.loads(Path(__file__).with_name("node_messages.json").read_text())
CLIENTS = {"geth", "erigon", "nethermind", "besu", "reth", "anvil"}


def name(row):
    return f"{row['client']}: {row['message'][:40]}"


@pytest.mark.parametrize("row", SAID["sending"], ids=name)
def test_sending__words_of_a_node__what_they_mean(row):
    for words in (row["message"], row["message"].upper()):
        if row["expected"] in {outcome.value for outcome in Broadcast}:
            assert classify(words) is Broadcast(row["expected"])
            assert refusal(words) is None
        else:
            assert classify(words) is Broadcast.REFUSED
            assert refusal(words) is Refusal(row["expected"])


@pytest.mark.parametrize("row", SAID["errors"], ids=name)
def test_fault__error_of_a_node__whose_it_is(row):
    assert fault(row["code"], row["message"]) is Fault(row["expected"])
    assert fault(row["code"], row["message"].upper()) is Fault(row["expected"])


@pytest.mark.parametrize("row", SAID["errors"], ids=name)
def test_has_no_block_yet__error_of_a_node__only_where_a_tag_has_no_block(row):
    for words in (row["message"], row["message"].upper()):
        assert has_no_block_yet(row["code"], words) is row.get("no_block_yet", False)


def test_has_no_block_yet__words_that_nobody_knows__not_found_is_taken_for_it():
    assert has_no_block_yet(-32000, "no finalized block was not found yet") is True
    assert has_no_block_yet(-32000, "unknown tag: finalized") is False


def test_sending__anything_a_node_says_of_a_transaction__is_never_the_nodes_fault():
    for row in SAID["sending"]:
        if row["expected"] != "unknown":
            assert fault(-32603, row["message"]) is Fault.REQUEST
            assert fault(-32005, row["message"]) is Fault.REQUEST


@pytest.mark.parametrize("table", ["_SENDING", "_ERRORS"])
def test_tables__every_entry__decides_a_fixture(table):
    rows = SAID["sending" if table == "_SENDING" else "errors"]
    entries = getattr(refusals, table)

    def first(row):
        text = row["message"].lower()
        matches = (
            entry
            for entry in entries
            if entry.words in text and getattr(entry, "code", None) in {None, row.get("code")}
        )
        return next(matches, None)

    decided = [first(row) for row in rows]
    assert [entry for entry in entries if entry not in decided] == []


def test_fixtures__every_client__has_its_own_with_a_source():
    assert {row["client"] for row in SAID["sending"]} >= CLIENTS
    assert {row["client"] for row in SAID["errors"]} >= CLIENTS | {"Infura", "Alchemy", "QuickNode", "proxyd"}
    assert all(row["source"] for row in SAID["sending"] + SAID["errors"])
