"""`waterfall keystore`, as somebody types it."""

import pytest
from eth_account import Account
from typer.testing import CliRunner

from waterfall import signers
from waterfall.cli.app import app

PASSWORD = "correct horse"


@pytest.fixture(autouse=True)
def quick_kdf(monkeypatch):
    """Few rounds: these passwords protect nothing."""
    encrypt = Account.encrypt
    monkeypatch.setattr(Account, "encrypt", lambda key, word: encrypt(key, word, kdf="pbkdf2", iterations=2))
    monkeypatch.delenv("WATERFALL_KEYSTORE_PASSWORD", raising=False)


def run(*arguments, typed="", **env):
    """Exit code, output, and what went to standard error."""
    done = CliRunner().invoke(app, ["keystore", *map(str, arguments)], input=typed, env=env)
    assert isinstance(done.exception, SystemExit | None), done.exception
    assert PASSWORD not in done.output
    return done.exit_code, done.stdout.strip(), done.stderr


def test_new__password_of_the_environment__file_that_opens_with_it(tmp_path):
    file = tmp_path / "gas.json"
    code, address, _ = run("new", file, WATERFALL_KEYSTORE_PASSWORD=PASSWORD)
    assert (code, address) == (0, signers.from_keystore(file, PASSWORD).address)
    assert run("address", file, WATERFALL_KEYSTORE_PASSWORD=PASSWORD)[:2] == (0, address)


def test_new__password_of_another_variable_or_a_file__is_taken(tmp_path):
    file, word = tmp_path / "gas.json", tmp_path / "password"
    word.write_text(PASSWORD + "\n")
    code, address, _ = run("new", file, "--password-env", "MINE", MINE=PASSWORD)
    assert code == 0
    assert run("address", file, "--password-file", word)[:2] == (0, address)


def test_new__no_variable__asks_twice_and_address_once(tmp_path):
    file = tmp_path / "gas.json"
    code, address, asked = run("new", file, typed=f"{PASSWORD}\n{PASSWORD}\n")
    assert (code, address) == (0, signers.from_keystore(file, PASSWORD).address)
    assert asked.count("Password") == 1
    assert asked.count("Repeat") == 1
    assert run("address", file, typed=f"{PASSWORD}\n")[:2] == (0, address)


def test_new__file_is_there__stays_and_nobody_is_asked(tmp_path):
    file = tmp_path / "gas.json"
    file.write_text("what was there")
    code, _, said = run("new", file)
    assert code == 1
    assert "already" in said
    assert "Password" not in said
    assert file.read_text() == "what was there"


def test_new__empty_password__makes_no_file(tmp_path):
    code, _, said = run("new", tmp_path / "gas.json", WATERFALL_KEYSTORE_PASSWORD="")
    assert (code, "needs a password" in said) == (1, True)
    assert not list(tmp_path.iterdir())


def test_address__wrong_password__is_refused(tmp_path):
    file = tmp_path / "gas.json"
    run("new", file, WATERFALL_KEYSTORE_PASSWORD=PASSWORD)
    code, address, said = run("address", file, WATERFALL_KEYSTORE_PASSWORD="guess-of-it")
    assert (code, address, "cannot be opened" in said) == (1, "", True)
    assert "guess-of-it" not in said
