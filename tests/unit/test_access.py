import pytest
from making import ACCOUNT, OTHER

from waterfall.errors import ApiKeyExpired, InvalidApiKey, InvalidRequest, PermissionDenied
from waterfall.gateway.access import authenticate, payer
from waterfall.ledger import journal
from waterfall.ledger.journal import Caller


def showing(**headers):
    return {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.fixture
async def keys(desk):
    """The secrets of an account's key and of the platform's."""
    await desk.ledger.keys.add("wf_ada", account=ACCOUNT, name="ada")
    await desk.ledger.keys.add("wf_admin", account=None, name="admin")
    return desk.ledger.keys


@pytest.mark.parametrize("header", ["Bearer wf_ada", "bearer wf_ada", "BEARER  wf_ada ", "Bearer wf_ada\t"])
async def test_authenticate__bearer__any_spelling(keys, header):
    access = authenticate(keys, showing(authorization=header))
    assert (access.key.account, access.is_admin) == (ACCOUNT, False)


@pytest.mark.parametrize(
    "header", ["", "wf_ada", "Bearer", "Bearer ", "Basic wf_ada", "Bearer wf_bob", "Bearer wf_\xff"]
)
async def test_authenticate__anything_else__is_no_key(keys, header):
    with pytest.raises(InvalidApiKey):
        authenticate(keys, showing(authorization=header))


async def test_authenticate__no_header__is_no_key(keys):
    with pytest.raises(InvalidApiKey):
        authenticate(keys, showing())


async def test_authenticate__expired__says_since_when(keys):
    await keys.add("wf_old", account=ACCOUNT, name="old", expires_at=1_700_000_000_000)
    with pytest.raises(ApiKeyExpired, match="2023-11-14"):
        authenticate(keys, showing(authorization="Bearer wf_old"))


async def test_authenticate__not_expired_yet__is_good(keys):
    await keys.add("wf_new", account=ACCOUNT, name="new", expires_at=journal.now_ms() + 60_000)
    assert authenticate(keys, showing(authorization="Bearer wf_new")).key.name == "new"


async def test_require__accounts_key__only_its_own_account(keys):
    access = authenticate(keys, showing(authorization="Bearer wf_ada"))
    access.require_account(ACCOUNT)
    with pytest.raises(PermissionDenied):
        access.require_account(OTHER)
    with pytest.raises(PermissionDenied):
        access.require_admin()


async def test_require__platforms_key__everything(keys):
    access = authenticate(keys, showing(authorization="Bearer wf_admin"))
    access.require_account(OTHER)
    access.require_admin()


async def test_payer__accounts_key__its_account_pays(keys):
    caller = payer(keys, showing(authorization="Bearer wf_ada"))
    assert caller == Caller(ACCOUNT, keys.find("wf_ada").id)
    assert payer(keys, showing(authorization="Bearer wf_ada", x_waterfall_account=ACCOUNT.upper())) == caller


async def test_payer__accounts_key_naming_another__is_refused(keys):
    with pytest.raises(PermissionDenied):
        payer(keys, showing(authorization="Bearer wf_ada", x_waterfall_account=OTHER))


async def test_payer__platforms_key__the_named_account_pays(keys):
    caller = payer(keys, showing(authorization="Bearer wf_admin", x_waterfall_account=OTHER))
    assert caller == Caller(OTHER, keys.find("wf_admin").id)


async def test_payer__platforms_key_naming_nobody__is_refused(keys):
    with pytest.raises(InvalidRequest, match="X-Waterfall-Account"):
        payer(keys, showing(authorization="Bearer wf_admin"))
