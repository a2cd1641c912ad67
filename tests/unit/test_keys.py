import hashlib
import re

import pytest
from making import ACCOUNT, OTHER, only_sqlite

from waterfall.errors import LedgerError
from waterfall.ledger import journal, keys, schema


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
