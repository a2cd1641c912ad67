from datetime import UTC, datetime
from decimal import Decimal

import pytest

from waterfall.errors import InvalidRequest, ModelNotFound, ModelNotPriced
from waterfall.gateway.config import GatewaySettings, ModelSettings, Tariffs, UpstreamSettings
from waterfall.gateway.models import Models
from waterfall.gateway.upstreams import Upstream
from waterfall.receipts import price_id

UPSTREAMS = {"local": Upstream("local", UpstreamSettings(kind="openai", base_url="http://127.0.0.1:1/v1"))}
PRICED = {"input_usd_per_mtok": "0.15", "output_usd_per_mtok": "0.60"}


def models(**named):
    settings = {name: ModelSettings(upstream="local", **fields) for name, fields in named.items()}
    return Models(settings, UPSTREAMS, GatewaySettings(default_max_output_tokens=1000))


def test_models__priced_in_the_settings__card_as_written():
    model = models(house=PRICED).find("house")
    (rates,) = model.card.rates
    assert (model.card.model, model.card.source) == ("house", "waterfall.toml")
    assert (rates.input_usd_per_mtok, rates.output_usd_per_mtok) == (Decimal("0.15"), Decimal("0.60"))
    assert rates.cached_input_usd_per_mtok == rates.input_usd_per_mtok
    assert model.price_id == price_id(model.card)
    assert model.upstream is UPSTREAMS["local"]


def test_models__cached_input_free__is_free_and_not_absent():
    model = models(house={**PRICED, "cached_input_usd_per_mtok": "0"}).find("house")
    assert model.card.rates[0].cached_input_usd_per_mtok == 0


def test_models__free_model__has_a_price_of_zero():
    model = models(house={"input_usd_per_mtok": "0", "output_usd_per_mtok": "0"}).find("house")
    assert model.card.rates[0].output_usd_per_mtok == 0


def test_models__published__card_of_the_upstreams_model_under_our_name():
    model = models(house={"model": "gpt-4o-mini", "provider": "openai"}).find("house")
    assert model.upstream_model == "gpt-4o-mini"
    assert model.card.model == "house"
    assert "gpt-4o-mini" in model.card.source


def test_models__no_name_of_its_own_upstream__is_called_the_same():
    assert models(house=PRICED).find("house").upstream_model == "house"


def test_models__output_cap__the_models_else_the_gateways():
    found = models(a=PRICED, b={**PRICED, "max_output_tokens": 7})
    assert found.find("a").default_max_output_tokens == 1000
    assert found.find("b").default_max_output_tokens == 7


def test_models__no_price_known__is_refused_and_never_free():
    found = models(**{"no-such-model": {}, "house": PRICED})
    assert found.unpriced == ["no-such-model"]
    assert [model.name for model in found.all()] == ["house"]
    with pytest.raises(ModelNotPriced, match="no-such-model"):
        found.find("no-such-model")


def test_models__unknown_name__is_not_found_and_cut_short():
    with pytest.raises(ModelNotFound) as refusal:
        models(house=PRICED).find("x" * 5000)
    assert len(refusal.value.message) < 200


def test_models__name_in_another_case__is_another_model():
    with pytest.raises(ModelNotFound):
        models(house=PRICED).find("House")


# ── Tariffs ──────────────────────────────────────────────────────────────────────────────────────────

ACCOUNT, OTHER = "0x" + "11" * 32, "0x" + "22" * 32
TARIFFS = Tariffs.model_validate(
    {
        "platform": {"percent": "20", "models": {"dear": {"percent": "50", "least_usd_per_call": "0.01"}}},
        "plans": {"pro": {"percent": "0", "usd_per_call": "0.001"}},
        "accounts": {
            ACCOUNT: {"plan": "pro"},
            OTHER: {
                "tariff": {
                    "models": {
                        "house": {"input_usd_per_mtok": "9", "output_usd_per_mtok": "9", "percent": "-10"}
                    }
                }
            },
        },
    }
)


def marked_up():
    settings = {name: ModelSettings(upstream="local", **PRICED) for name in ("house", "dear")}
    return Models(settings, UPSTREAMS, GatewaySettings(), TARIFFS)


def test_tariff__platforms__is_everybodys():
    model = marked_up().find("house")
    assert model.card.rates[0].input_usd_per_mtok == Decimal("0.18")
    assert model.vendor_card.rates[0].input_usd_per_mtok == Decimal("0.15")
    assert model.price_id == price_id(model.card)


def test_tariff__of_one_model__takes_the_place_of_the_rest():
    card = marked_up().find("dear").card
    assert (card.rates[0].input_usd_per_mtok, card.least_usd_per_call) == (Decimal("0.225"), Decimal("0.01"))


def test_tariff__plan_of_an_account__takes_the_place_of_the_platforms():
    card = marked_up().find("house", ACCOUNT).card
    assert (card.rates[0].input_usd_per_mtok, card.usd_per_call) == (Decimal("0.15"), Decimal("0.001"))


def test_tariff__account_of_its_own_prices__pays_those_and_costs_the_vendors():
    model = marked_up().find("house", OTHER)
    assert model.card.rates[0].input_usd_per_mtok == Decimal("8.1")
    assert model.vendor_card.rates[0].input_usd_per_mtok == Decimal("0.15")
    assert marked_up().find("dear", OTHER).card == marked_up().find("dear", OTHER).vendor_card


def test_tariff__same_prices__same_price_id():
    found = marked_up()
    assert found.find("house", "0x" + "33" * 32) is found.find("house")
    assert found.find("house", ACCOUNT).price_id != found.find("house").price_id


# ── Times ────────────────────────────────────────────────────────────────────────────────────────────


def test_models__prices_from_a_time_on__apply_from_then_without_a_restart():
    now = [datetime(2026, 12, 31, 23, 59, tzinfo=UTC)]
    later = {"starts_at": "2027-01-01T00:00:00Z", "input_usd_per_mtok": "1", "output_usd_per_mtok": "2"}
    settings = {"house": ModelSettings.model_validate({"upstream": "local", **PRICED, "later": [later]})}
    found = Models(settings, UPSTREAMS, GatewaySettings(), now=lambda: now[0])
    assert found.find("house").card.rates[0].input_usd_per_mtok == Decimal("0.15")
    now[0] = datetime(2027, 1, 1, tzinfo=UTC)
    assert found.find("house").card.rates[0].input_usd_per_mtok == 1


def test_models__published_price_that_changes__applies_from_its_day():
    now = [datetime(2025, 6, 9, 23, 59, tzinfo=UTC)]
    settings = {"o3": ModelSettings(upstream="local", provider="openai")}
    found = Models(settings, UPSTREAMS, GatewaySettings(), now=lambda: now[0])
    assert found.find("o3").card.rates[0].input_usd_per_mtok == 10
    now[0] = datetime(2025, 6, 10, tzinfo=UTC)
    assert found.find("o3").card.rates[0].input_usd_per_mtok == 2


# ── Surfaces ─────────────────────────────────────────────────────────────────────────────────────────


def test_serving__surface_that_the_upstream_has__is_the_model():
    assert models(house=PRICED).serving("house", "responses").name == "house"


def test_serving__surface_that_the_upstream_lacks__is_refused():
    with pytest.raises(InvalidRequest, match="not served as messages, but as chat, responses, embeddings"):
        models(house=PRICED).serving("house", "messages")


def test_serving__model_without_output__is_for_embeddings_only():
    found = models(e={"model": "text-embedding-3-small", "provider": "openai"})
    assert found.serving("e", "embeddings").name == "e"
    with pytest.raises(InvalidRequest, match="not served as chat, but as embeddings"):
        found.serving("e", "chat")


def test_models__known_provider__its_context_and_images_are_known():
    found = models(
        house={"model": "gpt-4o-mini", "provider": "openai"},
        mine={**PRICED, "context_tokens": 8000, "image_tokens": 7},
        bare=PRICED,
    )
    assert (found.find("house").context_tokens, found.find("house").image_tokens) == (128_000, 50_000)
    assert (found.find("mine").context_tokens, found.find("mine").image_tokens) == (8000, 7)
    assert (found.find("bare").context_tokens, found.find("bare").image_tokens) == (None, None)
