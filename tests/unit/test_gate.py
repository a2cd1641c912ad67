import pytest

from waterfall.ledger.gate import Gate
from waterfall.ledger.shared import REFUSAL, Shared


def told(refusal):
    """What all are told is this."""
    return Shared(refusal=refusal)


@pytest.fixture
def gate():
    """Of a process that follows."""
    gate = Gate()
    gate.learn(told(None))
    return gate


def round_(gate, all_are_told):
    """One round of following: what is said is told to all, and read again."""
    all_are_told = gate.take_news().get(REFUSAL, all_are_told)
    gate.learn(told(all_are_told))
    return all_are_told


def test_refuse__reason__refuses_at_once_and_is_told_once(gate):
    gate.refuse("it stopped")
    assert gate.refusal == "it stopped"
    assert gate.take_news() == {REFUSAL: "it stopped"}
    assert gate.take_news() == {}
    gate.learn(told("it stopped"))
    gate.refuse("it stopped")
    assert gate.take_news() == {}


def test_refuse__no_more__own_older_word_that_is_still_known_to_all_refuses_nothing(gate):
    gate.refuse("it stopped")
    known = round_(gate, None)
    gate.refuse(None)
    assert gate.refusal is None
    gate.learn(told(known))  # it was being read meanwhile
    assert gate.refusal is None
    assert round_(gate, known) is None
    assert gate.refusal is None


def test_refuse__no_more_while_the_reason_is_being_told__is_told_too(gate):
    gate.refuse("it stopped")
    known = gate.take_news()[REFUSAL]
    gate.refuse(None)
    gate.learn(told(known))
    assert gate.refusal is None
    assert gate.take_news() == {REFUSAL: None}


def test_refuse__no_more__replaces_what_a_predecessor_said(gate):
    gate.learn(told("it stopped"))
    assert gate.refusal == "it stopped"
    gate.refuse(None)
    assert gate.refusal is None
    assert round_(gate, "it stopped") is None


def test_refuse__no_more_but_it_could_not_be_told__refuses_until_it_is_said_again(gate):
    gate.refuse("it stopped")
    known = round_(gate, None)
    gate.refuse(None)
    gate.take_news()  # and the database fails
    gate.learn(told(known))
    assert gate.refusal == "it stopped"
    gate.refuse(None)
    assert round_(gate, known) is None
    assert gate.refusal is None


def test_learn__another_process_refuses_after_this_one_did_not__refuses(gate):
    """Who leads may have changed: in doubt, calls are refused."""
    gate.refuse(None)
    gate.learn(told("it stopped"))
    assert gate.refusal == "it stopped"


def test_step_down__what_all_are_told__is_what_counts(gate):
    gate.refuse("it stopped")
    gate.step_down()
    assert gate.refusal is None
    gate.learn(told("so the new leader says"))
    assert gate.refusal == "so the new leader says"


def test_step_down__after_refusing_no_more__own_last_word_known_to_all_refuses(gate):
    gate.refuse("it stopped")
    known = round_(gate, None)
    gate.refuse(None)
    gate.step_down()
    assert gate.refusal == known == "it stopped"
    assert gate.take_news() == {}, "only who leads tells others"
