"""No value is cut to fit: one bit above its type's width, and the whole call reverts before it does anything."""

import pytest
from eth_utils import to_checksum_address
from web3.exceptions import ContractLogicError

WORD = 32
POLICY_WIDTHS = [80, 80, 32, 40]


def width(kind):
    """Bits that a value of this type may have; None: all of the word, or several words."""
    if kind == "address":
        return 160
    return int(kind[4:]) if kind.startswith("uint") and kind[4:].isdigit() and kind != "uint256" else None


def zero(kind):
    if kind.endswith("[]"):
        return []
    if kind == "tuple":
        return [0] * len(POLICY_WIDTHS)
    return {"address": to_checksum_address(bytes(20)), "bytes32": bytes(32), "bytes": b""}.get(kind, 0)


@pytest.fixture(scope="session")
def answer(vault, chain):
    """What a call of the vault with this data answers or reverts with."""

    def answer(data, sender):
        try:
            return chain.provider.web3.eth.call({"from": sender.address, "to": vault.address, "data": data})
        except ContractLogicError as error:
            return error.data

    return answer


def with_bit(data, word, bit):
    start = 4 + WORD * word
    changed = int.from_bytes(data[start : start + WORD], "big") | 1 << bit
    return data[:start] + changed.to_bytes(WORD, "big") + data[start + WORD :]


def test_every_function__value_a_bit_too_wide__reverts_undecoded(vault, stranger, answer):
    seen = 0
    for method in vault.contract_type.mutable_methods:
        data = bytes(getattr(vault, method.name).encode_input(*(zero(value.type) for value in method.inputs)))
        assert answer(data, stranger) != "0x", f"{method.name} of zeros tells what is wrong with them"
        for word, value in enumerate(method.inputs):
            if (bits := width(value.type)) is not None:
                told = answer(with_bit(data, word, bits), stranger)
                assert told == "0x", f"{method.name}({value.name})"
                seen += 1
    assert seen > 2 * len(vault.contract_type.mutable_methods)


@pytest.mark.parametrize(("field", "bits"), enumerate(POLICY_WIDTHS))
def test_set_policy__limit_a_bit_too_wide__reverts_undecoded(
    vault, platform, account, operator, answer, field, bits
):
    data = bytes(vault.setPolicy.encode_input(platform, account, 7, [1, 1, 60, 1]))
    assert answer(data, operator) == b""
    assert answer(with_bit(data, 3 + field, bits), operator) == "0x"
