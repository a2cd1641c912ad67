import importlib
import inspect
import pkgutil
import string

import pytest

import waterfall
from waterfall.errors import FundsHeld, InsufficientFunds, PaymentRequired, WaterfallError


def every_error():
    for module in pkgutil.walk_packages(waterfall.__path__, "waterfall."):
        if module.name.endswith(".migrations.env"):  # Alembic's, which runs when it is imported
            continue
        if not module.name.startswith(("waterfall.cli", "waterfall.devnet")):
            importlib.import_module(module.name)
    found, todo = [], [WaterfallError]
    while todo:
        error = todo.pop()
        found.append(error)
        todo += error.__subclasses__()
    return sorted(found, key=lambda error: (error.__module__, error.__name__))


ERRORS = every_error()
PUBLIC = [error for error in ERRORS if not error.__name__.startswith("_")]


@pytest.mark.parametrize("error", PUBLIC, ids=lambda error: error.__name__)
def test_error__its_facts__are_its_message(error):
    names = {field for _, field, _, _ in string.Formatter().parse(inspect.cleandoc(error.__doc__)) if field}
    raised = error(**{name: f"<{name}>" for name in names})
    assert all(f"<{name}>" in raised.message for name in names)
    assert "{" not in raised.message
    assert "\n" not in raised.message
    assert str(raised) == raised.message
    assert raised.details == {name: f"<{name}>" for name in names}


@pytest.mark.parametrize("error", PUBLIC, ids=lambda error: error.__name__)
def test_error__code_and_status__fit_http(error):
    assert error.code == error.code.lower()
    assert " " not in error.code
    assert 400 <= error.status <= 599


def test_errors__in_the_vocabulary__each_has_its_own_code():
    here = [error for error in PUBLIC if error.__module__ == "waterfall.errors"]
    codes = [error.code for error in here]
    assert sorted(set(codes)) == sorted(codes)


def test_error__a_fact_with_braces__is_shown_as_it_is():
    error = WaterfallError.__subclasses__()[0](reason="{oops} {0}")
    assert error.message == "{oops} {0}"


def test_errors__short_of_money__are_told_apart():
    assert InsufficientFunds.status == FundsHeld.status == 402
    assert InsufficientFunds.code == "insufficient_funds"
    assert FundsHeld.code == "funds_held"
    assert not issubclass(FundsHeld, InsufficientFunds)
    assert issubclass(FundsHeld, PaymentRequired)
