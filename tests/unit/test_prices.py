from datetime import UTC, date, datetime
from decimal import Decimal
from fractions import Fraction

import pytest
from genai_prices import Usage as GenaiUsage
from genai_prices import calc_price, data_snapshot
from hypothesis import given
from hypothesis import strategies as st
from making import USD, card

from waterfall.metering import prices
from waterfall.metering.prices import Most
from waterfall.metering.published import changes, published
from waterfall.types import RateCard, Rates, Usage

AT = datetime(2026, 1, 1, tzinfo=UTC)
LATER = datetime(2030, 1, 1, tzinfo=UTC)
PRICES = st.decimals(min_value=0, max_value=1000, places=6)
SINGLE = st.decimals(min_value=0, max_value=1, places=12)
TOKENS = st.integers(0, 10**7)


@st.composite
def rates(draw, above=0):
    return Rates(
        above_input_tokens=above,
        input_usd_per_mtok=draw(PRICES),
        cached_input_usd_per_mtok=draw(PRICES),
        cache_write_usd_per_mtok=draw(PRICES),
        cache_write_1h_usd_per_mtok=draw(PRICES),
        image_usd_per_mtok=draw(PRICES),
        output_usd_per_mtok=draw(PRICES),
    )


@st.composite
def cards(draw):
    steps = sorted(draw(st.sets(st.integers(1, 1000), max_size=3)) | {0})
    return RateCard(
        model="m",
        source="test",
        rates=tuple(draw(rates(step)) for step in steps),
        usd_per_web_search=draw(SINGLE),
        usd_per_call=draw(SINGLE),
        least_usd_per_call=draw(SINGLE),
    )


@st.composite
def usages(draw, most_input=2000, most_output=2000, *, of_all_kinds=True):
    input_tokens, output_tokens = draw(st.integers(0, most_input)), draw(st.integers(0, most_output))
    left, parts = input_tokens, {}
    for name in ("cached_input_tokens", "cache_write_tokens", "cache_write_1h_tokens", "image_tokens"):
        parts[name] = draw(st.integers(0, left)) if of_all_kinds or name == "cached_input_tokens" else 0
        left -= parts[name]
    return Usage(
        input_tokens=input_tokens,
        **parts,
        output_tokens=output_tokens,
        reasoning_tokens=draw(st.integers(0, output_tokens)),
        web_searches=draw(st.integers(0, 5)) if of_all_kinds else 0,
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
    plain = (
        usage.input_tokens
        - usage.cached_input_tokens
        - usage.cache_write_tokens
        - usage.cache_write_1h_tokens
        - usage.image_tokens
    )
    of_tokens = (
        Fraction(step.input_usd_per_mtok) * plain
        + Fraction(step.cached_input_usd_per_mtok) * usage.cached_input_tokens
        + Fraction(step.cache_write_usd_per_mtok) * usage.cache_write_tokens
        + Fraction(step.cache_write_1h_usd_per_mtok) * usage.cache_write_1h_tokens
        + Fraction(step.image_usd_per_mtok) * usage.image_tokens
        + Fraction(step.output_usd_per_mtok) * usage.output_tokens
    ) / 10**6
    exact = (
        of_tokens + Fraction(tariff.usd_per_call) + usage.web_searches * Fraction(tariff.usd_per_web_search)
    )
    exact = max(exact, Fraction(tariff.least_usd_per_call)) * USD
    amount = prices.amount(usage, tariff)
    assert amount - 1 < exact <= amount


@given(usages(), cards(), st.integers(0, 2000))
def test_amount__reasoning_tokens__are_billed_once_as_output(usage, tariff, reasoning):
    other = usage.model_copy(update={"reasoning_tokens": min(reasoning, usage.output_tokens)})
    assert prices.amount(other, tariff) == prices.amount(usage, tariff)


def flat(above, inputs, outputs):
    """Rates with one price for all input."""
    of_input = {name: Decimal(inputs) for name in Rates.model_fields if name != "above_input_tokens"}
    return Rates(above_input_tokens=above, **{**of_input, "output_usd_per_mtok": Decimal(outputs)})


TIERED = RateCard(model="m", source="test", rates=(flat(0, 1, 1), flat(200, 2, 3)))


@pytest.mark.parametrize(("tokens", "micros"), [(199, 199), (200, 200), (201, 402)])
def test_amount__threshold_of_a_tier__is_crossed_above_it_for_the_whole_call(tokens, micros):
    assert prices.amount(Usage(input_tokens=tokens, output_tokens=0), TIERED) == micros * 10**6


# ── Markup ───────────────────────────────────────────────────────────────────────────────────────────


@given(cards(), usages(), st.decimals(min_value=-100, max_value=1000, places=4))
def test_marked_up__any_percentage__of_every_price_and_never_less_than_exact(tariff, usage, percent):
    bare = tariff.model_copy(update={"usd_per_call": Decimal(0), "least_usd_per_call": Decimal(0)})
    dearer = prices.marked_up(bare, percent, Decimal(0), Decimal(0))
    exact = Fraction(prices.amount(usage, bare)) * Fraction(100 + percent) / 100
    rounded = usage.input_tokens + usage.output_tokens + 10**6 * usage.web_searches
    amount = prices.amount(usage, dearer)
    # Each price is rounded up by less than 10**-12, and the bare amount by less than one unit.
    assert exact - Fraction(100 + percent) / 100 <= amount <= exact + Fraction(rounded, 10**6) + 1


def test_marked_up__twenty_percent__to_the_last_decimal():
    dearer = prices.marked_up(
        card(inputs="0.15", outputs="0.000000000001"), Decimal(20), Decimal("0.5"), Decimal(1)
    )
    assert dearer.rates[0].input_usd_per_mtok == Decimal("0.18")
    assert dearer.rates[0].output_usd_per_mtok == Decimal("0.000000000002")
    assert (dearer.usd_per_call, dearer.least_usd_per_call) == (Decimal("0.5"), 1)
    assert prices.amount(Usage(input_tokens=1, output_tokens=0), dearer) == USD
    assert prices.amount(Usage(input_tokens=10**7, output_tokens=0), dearer) == USD * 23 // 10


# ── The bound ────────────────────────────────────────────────────────────────────────────────────────


@given(cards(), usages(), st.integers(0, 100), st.integers(0, 100))
def test_bound__any_usage_within_it__costs_no_more(tariff, usage, more_input, more_output):
    most = usage.output_tokens + more_output
    within = Most(usage.input_tokens + more_input, web_searches=usage.web_searches)
    assert prices.amount(usage, tariff) <= prices.bound(tariff, within, most, 0).amount(most)


@given(cards(), usages(of_all_kinds=False))
def test_bound__no_writes_and_no_images__is_held_at_what_input_and_cached_input_cost(tariff, usage):
    within = Most(usage.input_tokens, cache_writes=False, images=False)
    bound = prices.bound(tariff, within, usage.output_tokens, 0)
    assert prices.amount(usage, tariff) <= bound.amount(usage.output_tokens)


@given(cards(), st.integers(0, 2000), st.data())
def test_bound__what_a_wallet_affords__is_the_most_it_pays_for(tariff, input_tokens, data):
    most = data.draw(st.integers(0, 2000))
    least = data.draw(st.integers(0, most))
    bound = prices.bound(tariff, Most(input_tokens), most, least)
    available = data.draw(st.integers(0, bound.amount(most) + 10))
    tokens = bound.affordable_output_tokens(available)
    if tokens is None:
        assert bound.amount(least) > available
    else:
        assert least <= tokens <= most
        assert bound.amount(tokens) <= available
        assert tokens == most or bound.amount(tokens + 1) > available


def test_bound__dearer_tier_within_reach__is_held():
    assert prices.bound(TIERED, Most(200), 1, 1).amount(1) == 201 * 10**6
    assert prices.bound(TIERED, Most(201), 1, 1).amount(1) == (402 + 3) * 10**6


def test_bound__cached_input_dearer_than_input__is_held():
    assert prices.bound(card(inputs="1", outputs="0", cached="5"), Most(10), 0, 0).amount(0) == 50 * 10**6


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
            cache_write_tokens=usage.cache_write_tokens,
            output_tokens=usage.output_tokens,
        ),
        model,
        provider_id=provider,
        genai_request_timestamp=at,
    ).total_price
    ours = prices.amount(usage, tariff)
    assert ours - 1 < Fraction(theirs) * USD <= ours, (provider, model, usage)


def published_card(model, provider_model, provider, at):
    found = published(model, provider_model, provider, at)
    return None if found is None else found.card


def card_of(provider, model):
    found = published_card(model, model, provider, AT)
    assert found is not None
    return found


@pytest.mark.parametrize(("provider", "model"), PUBLISHED)
@given(usages(most_input=400_000, most_output=100_000, of_all_kinds=False))
def test_published_card__any_usage__costs_what_genai_prices_says(provider, model, usage):
    assert_agrees(usage, card_of(provider, model), model, provider, AT)


def test_published_card__tiers__are_kept():
    tariff = card_of("google", "gemini-2.5-pro")
    assert [r.above_input_tokens for r in tariff.rates] == [0, 200_000]
    assert tariff.rates[1].input_usd_per_mtok > tariff.rates[0].input_usd_per_mtok


def test_published_card__name_for_callers__is_the_cards_model():
    found = published_card("house-model", "gpt-4o-mini", "openai", AT)
    assert found.model == "house-model"
    assert found.source.endswith("openai/gpt-4o-mini")


@pytest.mark.parametrize("model", ["no-such-model", ""])
def test_published_card__unknown_model__is_none_not_free(model):
    assert published_card(model, model, None, AT) is None


def test_published_card__price_that_a_card_cannot_express__is_none():
    # Perplexity bills each request on top of its tokens.
    assert published_card("sonar", "sonar", "perplexity", AT) is None


def test_published__no_price_for_output__is_a_model_for_embeddings():
    found = published("e", "text-embedding-3-small", "openai", AT)
    assert not found.has_output
    assert found.card.rates[0].input_usd_per_mtok == Decimal("0.02")
    assert published("g", "gpt-4o-mini", "openai", AT).has_output


def test_published__context__is_the_models():
    found = published("c", "claude-sonnet-4-5", "anthropic", AT)
    assert (found.provider, found.context_tokens) == ("anthropic", 200_000)


def test_published_card__anthropic__has_cache_writes_and_searches_of_their_own_price():
    rates = card_of("anthropic", "claude-sonnet-4-5").rates[0]
    assert (rates.cache_write_usd_per_mtok, rates.cache_write_1h_usd_per_mtok) == (Decimal("3.75"), 6)
    assert card_of("anthropic", "claude-sonnet-4-5").usd_per_web_search == Decimal("0.01")


def test_changes__price_that_is_announced__its_day():
    before = datetime(2025, 6, 1, tzinfo=UTC)
    assert changes("o3", "openai", before) == [date(2025, 6, 10)]
    assert changes("o3", "openai", datetime(2025, 6, 10, tzinfo=UTC)) == []
    assert changes("no-such-model", None, before) == []


def test_published_card__price_by_the_time_of_day__is_none():
    assert published_card("d", "deepseek-chat", "deepseek", AT) is None


def test_published_card__price_with_more_than_twelve_decimals__is_none():
    model = "meta-llama/Llama-3.3-70B-Instruct"
    assert published_card("llama", model, "huggingface_together", LATER) is None


def test_published_card__price_with_a_date__is_the_one_of_its_day():
    before = published_card("o3", "o3", "openai", datetime(2025, 6, 9, 23, 59, tzinfo=UTC))
    after = published_card("o3", "o3", "openai", datetime(2025, 6, 10, tzinfo=UTC))
    assert (before.rates[0].input_usd_per_mtok, after.rates[0].input_usd_per_mtok) == (10, 2)


def test_published_card__every_model_of_the_snapshot__costs_what_genai_prices_says():
    cards = 0
    for provider in data_snapshot.get_snapshot().providers:
        for model in provider.models:
            tariff = published_card("m", model.id, provider.id, LATER)
            if tariff is None:
                continue
            cards += 1
            steps = [rates.above_input_tokens for rates in tariff.rates]
            for sent in {0, 1000, *steps, *(step + 1 for step in steps)}:
                for cached, written in {(0, 0), (sent // 3, 0), (sent // 3, sent // 4)}:
                    usage = Usage(
                        input_tokens=sent,
                        cached_input_tokens=cached,
                        cache_write_tokens=written,
                        output_tokens=777,
                    )
                    assert_agrees(usage, tariff, model.id, provider.id, LATER)
    assert cards > 1000
