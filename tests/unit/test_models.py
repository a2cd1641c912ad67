from decimal import Decimal

import pytest

from waterfall.errors import ModelNotFound, ModelNotPriced
from waterfall.gateway.config import GatewaySettings, ModelSettings, UpstreamSettings
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
    assert [model.name for model in found] == ["house"]
    with pytest.raises(ModelNotPriced, match="no-such-model"):
        found.find("no-such-model")


def test_models__unknown_name__is_not_found_and_cut_short():
    with pytest.raises(ModelNotFound) as refusal:
        models(house=PRICED).find("x" * 5000)
    assert len(refusal.value.message) < 200


def test_models__name_in_another_case__is_another_model():
    with pytest.raises(ModelNotFound):
        models(house=PRICED).find("House")
