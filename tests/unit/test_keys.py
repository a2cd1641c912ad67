import hashlib
import re

import pytest
from making import ACCOUNT, OTHER, only_sqlite

from waterfall.errors import KeyNotFound, LedgerError
from waterfall.ledger import journal, keys, schema, shared


def test_new_secret__each__is_long_random_and_recognisable():
    secrets = {keys.new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(re.fullmatch(r"wf_[A-Za-z0-9_-]{43}", secret) for secret in secrets)


def test_hash_of__secret__is_its_sha256():
    assert keys.hash_of("wf_x") == hashlib.sha256(b"wf_x").hexdigest()


async def test_add__shown_again__is_found_by_its_secret_only(desk):
    secret = keys.new_secret()
    key = await desk.ledger.keys.add(secret, account=ACCOUNT, name="laptop", expires_at=2**41)
    assert desk.ledger.keys.find(secret) == key
    assert (key.account, key.name, key.expires_at, key.revoked_at) == (ACCOUNT, "laptop", 2**41, None)
    assert desk.ledger.keys.find(key.id) is None
    assert desk.ledger.keys.find(keys.hash_of(secret)) is None
    assert desk.ledger.keys.find("") is None


@only_sqlite
async def test_add__database__never_holds_the_secret(desk, tmp_path):
    secret = keys.new_secret()
    await desk.ledger.keys.add(secret, account=None, name="admin")
    (row,) = await desk.table(schema.api_keys)
    assert row["hash"] == keys.hash_of(secret)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret.encode() not in written
    assert keys.hash_of(secret).encode() in written


async def test_add__same_secret_again__is_the_same_key_with_its_new_name(desk):
    first = await desk.ledger.keys.add("wf_admin", account=None, name="admin")
    second = await desk.ledger.keys.add("wf_admin", account=None, name="root", expires_at=5)
    assert (second.id, second.created_at) == (first.id, first.created_at)
    assert (second.name, second.expires_at) == ("root", 5)
    assert desk.ledger.keys.find("wf_admin") == second
    assert len(await desk.table(schema.api_keys)) == 1


async def test_set_platform_key__another_than_before__takes_its_place(desk, open_ledger):
    await desk.ledger.keys.add("wf_user", account=ACCOUNT, name="admin")
    for secret in ("wf_old", "wf_new", "wf_new"):
        await desk.ledger.keys.set_platform_key(secret, "admin")
    assert desk.ledger.keys.find("wf_old").revoked_at is not None
    assert desk.ledger.keys.find("wf_new").revoked_at is None
    assert desk.ledger.keys.find("wf_user").revoked_at is None
    await desk.ledger.keys.set_platform_key("wf_old", "admin")
    desk.ledger.close()
    again = open_ledger()
    assert again.keys.find("wf_old").revoked_at is None
    assert again.keys.find("wf_new").revoked_at is not None


async def test_add__reopened_ledger__still_knows_it(desk, open_ledger):
    key = await desk.ledger.keys.add("wf_a", account=ACCOUNT, name="a")
    desk.ledger.close()
    assert open_ledger().keys.find("wf_a") == key


async def test_add__unknown_account__is_refused(desk):
    with pytest.raises(LedgerError, match=r"(?i)foreign key"):
        await desk.ledger.keys.add("wf_a", account=OTHER, name="a")
    assert desk.ledger.keys.find("wf_a") is None


async def test_key__id__says_nothing_of_the_secret(desk):
    key = await desk.ledger.keys.add("wf_a", account=None, name="a")
    assert re.fullmatch(r"key_[0-9a-f]{16}", key.id)
    assert key.created_at <= journal.now_ms()


# ── Ending ───────────────────────────────────────────────────────────────────────────────────────────


async def test_revoke__key_of_an_account__opens_nothing_any_more(desk, open_ledger):
    key = await desk.ledger.keys.add("wf_user", account=ACCOUNT, name="laptop")
    revoked = await desk.ledger.keys.revoke(key.id)
    assert revoked.revoked_at is not None
    assert desk.ledger.keys.find("wf_user") == revoked
    assert desk.ledger.keys.of(ACCOUNT) == [revoked]
    desk.ledger.close()
    again = open_ledger()
    try:
        assert again.keys.find("wf_user") == revoked
    finally:
        again.close()


async def test_revoke__no_valid_key_of_an_account__is_not_found(desk):
    platform = await desk.ledger.keys.add("wf_admin", account=None, name="admin")
    revoked = await desk.ledger.keys.add("wf_user", account=ACCOUNT, name="a")
    await desk.ledger.keys.revoke(revoked.id)
    expired = await desk.ledger.keys.add("wf_old", account=ACCOUNT, name="b", expires_at=1)
    for id_ in (platform.id, revoked.id, expired.id, "key_nothing", "\0"):
        with pytest.raises(KeyNotFound):
            await desk.ledger.keys.revoke(id_)
    assert desk.ledger.keys.find("wf_admin").revoked_at is None


async def test_rotate__at_once__the_fresh_key_has_name_and_expiry_and_the_old_one_ends(desk):
    old = await desk.ledger.keys.add("wf_old", account=ACCOUNT, name="laptop", expires_at=2**45)
    new = await desk.ledger.keys.rotate(old.id, "wf_new", grace_ms=0)
    assert (new.account, new.name, new.expires_at, new.revoked_at) == (ACCOUNT, "laptop", 2**45, None)
    assert new.id != old.id
    assert desk.ledger.keys.find("wf_old").revoked_at is not None
    assert desk.ledger.keys.find("wf_new") == new


async def test_rotate__with_grace__both_are_valid_for_that_long(desk):
    old = await desk.ledger.keys.add("wf_old", account=ACCOUNT, name="laptop")
    await desk.ledger.keys.rotate(old.id, "wf_new", grace_ms=60_000)
    still = desk.ledger.keys.find("wf_old")
    assert still.revoked_at is None
    assert 0 < still.expires_at - journal.now_ms() <= 60_000


async def test_rotate__key_that_ends_sooner_than_the_grace__is_not_made_to_last(desk):
    soon = journal.now_ms() + 30_000
    old = await desk.ledger.keys.add("wf_old", account=ACCOUNT, name="laptop", expires_at=soon)
    await desk.ledger.keys.rotate(old.id, "wf_new", grace_ms=60_000)
    assert desk.ledger.keys.find("wf_old").expires_at == soon


async def test_of__account__its_keys_only_oldest_first(desk):
    made = [await desk.ledger.keys.add(f"wf_{n}", account=ACCOUNT, name=str(n)) for n in range(3)]
    await desk.ledger.keys.add("wf_other", account=None, name="other")
    assert {key.id for key in desk.ledger.keys.of(ACCOUNT)} == {key.id for key in made}


async def failing_once(*_):
    raise LedgerError(reason="the disk is gone")


async def test_revoke__read_back_fails__is_known_as_revoked_by_the_next_try_at_the_latest(desk, monkeypatch):
    keyring = desk.ledger.keys
    key = await keyring.add("wf_user", account=ACCOUNT, name="laptop")
    with monkeypatch.context() as broken:
        broken.setattr(keyring._reader, "read", failing_once)  # noqa: SLF001 - a disk that fails between two steps
        with pytest.raises(LedgerError):
            await keyring.revoke(key.id)
    with pytest.raises(KeyNotFound):
        await keyring.revoke(key.id)
    assert keyring.find("wf_user").revoked_at is not None


async def test_learn__own_change_could_not_be_read_back__is_read_as_if_it_were_anothers(desk, monkeypatch):
    keyring = desk.ledger.keys
    key = await keyring.add("wf_user", account=ACCOUNT, name="laptop")
    with monkeypatch.context() as broken:
        broken.setattr(keyring._reader, "read", failing_once)  # noqa: SLF001
        with pytest.raises(LedgerError):
            await keyring.revoke(key.id)
    await keyring.learn(await desk.ledger.read(shared.read))
    assert keyring.find("wf_user").revoked_at is not None
