import pytest
from starlette.datastructures import Headers

from waterfall.errors import InvalidRequest
from waterfall.gateway.terms import Terms


@pytest.mark.parametrize(
    ("headers", "terms"),
    [
        ({}, Terms(0, settled=False)),
        ({"x-waterfall-wait": "0"}, Terms(0)),
        ({"x-waterfall-wait": "60"}, Terms(60)),
        ({"x-waterfall-settle": "async"}, Terms()),
        ({"x-waterfall-settle": "included", "x-waterfall-wait": "5"}, Terms(5, settled=True)),
    ],
)
def test_read__headers__are_the_terms(headers, terms):
    assert Terms.read(Headers(headers)) == terms


@pytest.mark.parametrize("value", ["", "-1", "61", "1.5", "five", "5s", "٥", "9" * 5000, "1e1"])
def test_read__wait_that_is_no_number_of_seconds__is_refused_by_name(value):
    with pytest.raises(InvalidRequest) as refused:
        Terms.read(Headers(raw=[(b"x-waterfall-wait", value.encode())]))
    assert refused.value.details["param"] == "X-Waterfall-Wait"


@pytest.mark.parametrize("value", ["", "Included", "final", "yes"])
def test_read__unknown_way_to_settle__is_refused_by_name(value):
    with pytest.raises(InvalidRequest) as refused:
        Terms.read(Headers({"x-waterfall-settle": value}))
    assert refused.value.details["param"] == "X-Waterfall-Settle"
