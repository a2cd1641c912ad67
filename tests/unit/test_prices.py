from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction

import pytest
from genai_prices import Usage as GenaiUsage
from genai_prices import calc_price, data_snapshot
from hypothesis import given
from hypothesis import strategies as st
from making import USD, card

from waterfall.metering import prices
from waterfall.types import RateCard, Rates, Usage

AT = datetime(2026, 1, 1, tzinfo=UTC)
LATER = datetime(2030, 1, 1, tzinfo=UTC)
PRICES = st.decimals(min_value=0, max_value=1000, places=6)
TOKENS = st.integers(0, 10**7)


@st.composite
def rates(draw, above=0):
    return Rates(
        above_input_tokens=above,
        input_usd_per_mtok=draw(PRICES),
        cached_input_usd_per_mtok=draw(PRICES),
        output_usd_per_mtok=draw(PRICES),
    )


@st.composite
def cards(draw):
    steps = sorted(draw(st.sets(st.integers(1, 1000), max_size=3)) | {0})
    return RateCard(model="m", source="test", rates=tuple(draw(rates(step)) for step in steps))


@st.composite
def usages(draw, most_input=2000, most_output=2000):
    input_tokens, output_tokens = draw(st.integers(0, most_input)), draw(st.integers(0, most_output))
    return Usage(
        input_tokens=input_tokens,
        cached_input_tokens=draw(st.integers(0, input_tokens)),
        output_tokens=output_tokens,
        reasoning_tokens=draw(st.integers(0, output_tokens)),
    )


# ── Amounts ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("usage", "units"),
    [
        (Usage(input_tokens=0, output_tokens=0), 0),
        (Usage(input_tokens=1, output_tokens=0), 150_000),  # 0.00000015 USD
        (Usage(input_tokens=1, cached_input_tokens=1, output_tokens=0), 75_000),
        (Usage(input_tokens=0, output_tokens=1), 600_000),
        (Usage(input_tokens=10**6, output_tokens=10**6), 3 * USD // 4),
    ],
)
def test_amount__golden_usage__exact_units(usage, units):
    assert prices.amount(usage, card("gpt-4o-mini", "0.15", "0.6", "0.075")) == units


def test_amount__one_token_of_the_cheapest_model__is_not_rounded_to_a_micro_dollar():
    embedding = card("text-embedding-3-small", "0.02", "0")
    assert prices.amount(Usage(input_tokens=1, output_tokens=0), embedding) == 20_000


def test_amount__less_than_a_unit__is_rounded_up_once():
    dust = card(inputs="0.000000000001", outputs="0.000000000001")
    assert prices.amount(Usage(input_tokens=1, output_tokens=0), dust) == 1
    assert prices.amount(Usage(input_tokens=1, output_tokens=1), dust) == 1
    assert prices.amount(Usage(input_tokens=10**6, output_tokens=1), dust) == 2


@given(usages(), cards())
def test_amount__any_usage__is_the_exact_product_rounded_up(usage, tariff):
    step = [r for r in tariff.rates if r.above_input_tokens < max(usage.input_tokens, 1)][-1]
    exact = (
        Fraction(step.input_usd_per_mtok) * (usage.input_tokens - usage.cached_input_tokens)
        + Fraction(step.cached_input_usd_per_mtok) * usage.cached_input_tokens
        + Fraction(step.output_usd_per_mtok) * usage.output_tokens
    ) * 10**6
    amount = prices.amount(usage, tariff)
    assert amount - 1 < exact <= amount


@given(usages(), cards(), st.integers(0, 2000))
def test_amount__reasoning_tokens__are_billed_once_as_output(usage, tariff, reasoning):
    other = usage.model_copy(update={"reasoning_tokens": min(reasoning, usage.output_tokens)})
    assert prices.amount(other, tariff) == prices.amount(usage, tariff)


TIERED = RateCard(
    model="m",
    source="test",
    rates=(
        Rates(
            input_usd_per_mtok=Decimal(1),
            cached_input_usd_per_mtok=Decimal(1),
            output_usd_per_mtok=Decimal(1),
        ),
        Rates(
            above_input_tokens=200,
            input_usd_per_mtok=Decimal(2),
            cached_input_usd_per_mtok=Decimal(2),
            output_usd_per_mtok=Decimal(3),
        ),
    ),
)


@pytest.mark.parametrize(("tokens", "micros"), [(199, 199), (200, 200), (201, 402)])
def test_amount__threshold_of_a_tier__is_crossed_above_it_for_the_whole_call(tokens, micros):
    assert prices.amount(Usage(input_tokens=tokens, output_tokens=0), TIERED) == micros * 10**6


# ── The bound ────────────────────────────────────────────────────────────────────────────────────────


@given(cards(), usages(), st.integers(0, 100), st.integers(0, 100))
def test_bound__any_usage_within_it__costs_no_more(tariff, usage, more_input, more_output):
    most = usage.output_tokens + more_output
    bound = prices.bound(tariff, usage.input_tokens + more_input, most, 0)
    assert prices.amount(usage, tariff) <= bound.amount(most)


@given(cards(), st.integers(0, 2000), st.data())
def test_bound__what_a_wallet_affords__is_the_most_it_pays_for(tariff, input_tokens, data):
    most = data.draw(st.integers(0, 2000))
    least = data.draw(st.integers(0, most))
    bound = prices.bound(tariff, input_tokens, most, least)
    available = data.draw(st.integers(0, bound.amount(most) + 10))
    tokens = bound.affordable_output_tokens(available)
    if tokens is None:
        assert bound.amount(least) > available
    else:
        assert least <= tokens <= most
        assert bound.amount(tokens) <= available
        assert tokens == most or bound.amount(tokens + 1) > available


def test_bound__dearer_tier_within_reach__is_held():
    assert prices.bound(TIERED, 200, 1, 1).amount(1) == 201 * 10**6
    assert prices.bound(TIERED, 201, 1, 1).amount(1) == (402 + 3) * 10**6


def test_bound__cached_input_dearer_than_input__is_held():
    assert prices.bound(card(inputs="1", outputs="0", cached="5"), 10, 0, 0).amount(0) == 50 * 10**6


@given(st.integers(0, 2**96))
def test_fixed__any_amount__is_its_bound(amount):
    bound = prices.fixed(amount)
    assert bound.amount(bound.output_tokens) == amount
    assert bound.affordable_output_tokens(amount) == 0
    assert bound.affordable_output_tokens(amount - 1) is None


# ── Published cards ──────────────────────────────────────────────────────────────────────────────────

PUBLISHED = [
    ("openai", "gpt-4o-mini"),
    ("openai", "gpt-4.1"),
    ("openai", "gpt-5"),
    ("google", "gemini-2.5-pro"),
    ("mistral", "mistral-large-latest"),
]


def assert_agrees(usage, tariff, model, provider, at):
    """We charge what genai-prices computes, rounded up to a whole unit."""
    theirs = calc_price(
        GenaiUsage(
            input_tokens=usage.input_tokens,
            cache_read_tokens=usage.cached_input_tokens,
            output_tokens=usage.output_tokens,
        ),
        model,
        provider_id=provider,
        genai_request_timestamp=at,
    ).total_price
    ours = prices.amount(usage, tariff)
    assert ours - 1 < Fraction(theirs) * USD <= ours, (provider, model, usage)


def published(provider, model):
    found = prices.published_card(model, model, provider, AT)
    assert found is not None
    return found


@pytest.mark.parametrize(("provider", "model"), PUBLISHED)
@given(usages(most_input=400_000, most_output=100_000))
def test_published_card__any_usage__costs_what_genai_prices_says(provider, model, usage):
    assert_agrees(usage, published(provider, model), model, provider, AT)


def test_published_card__tiers__are_kept():
    tariff = published("google", "gemini-2.5-pro")
    assert [r.above_input_tokens for r in tariff.rates] == [0, 200_000]
    assert tariff.rates[1].input_usd_per_mtok > tariff.rates[0].input_usd_per_mtok


def test_published_card__name_for_callers__is_the_cards_model():
    found = prices.published_card("house-model", "gpt-4o-mini", "openai", AT)
    assert found.model == "house-model"
    assert found.source.endswith("openai/gpt-4o-mini")


@pytest.mark.parametrize("model", ["no-such-model", ""])
def test_published_card__unknown_model__is_none_not_free(model):
    assert prices.published_card(model, model, None, AT) is None


def test_published_card__price_that_a_card_cannot_express__is_none():
    # Perplexity bills each request on top of its tokens.
    assert prices.published_card("sonar", "sonar", "perplexity", AT) is None


def test_published_card__embedding_without_output_price__is_none():
    assert prices.published_card("e", "text-embedding-3-small", "openai", AT) is None


def test_published_card__price_by_the_time_of_day__is_none():
    assert prices.published_card("d", "deepseek-chat", "deepseek", AT) is None


def test_published_card__price_with_more_than_twelve_decimals__is_none():
    model = "meta-llama/Llama-3.3-70B-Instruct"
    assert prices.published_card("llama", model, "huggingface_together", LATER) is None


def test_published_card__price_with_a_date__is_the_one_of_its_day():
    before = prices.published_card("o3", "o3", "openai", datetime(2025, 6, 9, 23, 59, tzinfo=UTC))
    after = prices.published_card("o3", "o3", "openai", datetime(2025, 6, 10, tzinfo=UTC))
    assert (before.rates[0].input_usd_per_mtok, after.rates[0].input_usd_per_mtok) == (10, 2)


def test_published_card__every_model_of_the_snapshot__costs_what_genai_prices_says():
    cards = 0
    for provider in data_snapshot.get_snapshot().providers:
        for model in provider.models:
            tariff = prices.published_card("m", model.id, provider.id, LATER)
            if tariff is None:
                continue
            cards += 1
            steps = [rates.above_input_tokens for rates in tariff.rates]
            for sent in {0, 1000, *steps, *(step + 1 for step in steps)}:
                for cached in {0, sent // 3}:
                    usage = Usage(input_tokens=sent, cached_input_tokens=cached, output_tokens=777)
                    assert_agrees(usage, tariff, model.id, provider.id, LATER)
    assert cards > 1000
