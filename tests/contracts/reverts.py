"""What a call must revert with, exactly."""

from contextlib import contextmanager

import ape


@contextmanager
def reverts(reason, **inputs):
    """Expects a custom error with these inputs, a message, or (None) a revert without data.

    Stricter than ape's: there, a revert that is no custom error passes for any custom error that was expected, and
    inputs that the error does not have are ignored.
    """
    with ape.reverts() as revert:
        yield
    if isinstance(reason, type):
        assert isinstance(revert.value, reason), f"expected {reason.__name__}, got {revert.value!r}"
        assert {name: revert.value.inputs.get(name) for name in inputs} == inputs
    else:
        assert revert.value.revert_message == (reason or ape.exceptions.ContractLogicError.DEFAULT_MESSAGE)
