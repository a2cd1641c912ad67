import pytest
import structlog
from fastapi import FastAPI
from scrape import samples

from waterfall.gateway.following import Following
from waterfall.gateway.tracing import Tracing
from waterfall.metrics import Metrics


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def ask(metrics):
    """Asks, and gives the status, the headers, and what a line that is logged meanwhile would be bound to."""
    bound = {}

    app = FastAPI(openapi_url=None)

    @app.get("/hello/{name}")
    async def serve(name: str):
        bound.update(structlog.contextvars.get_contextvars())
        if name == "bad":
            raise RuntimeError

    following = Following(app, metrics, Tracing())

    async def ask(path="/hello/ada", *, method="GET", leave=False, **headers):
        sent = []

        async def send(message):
            if leave:
                raise OSError
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
            "query_string": b"",
        }
        bound.clear()
        await following(scope, None, send)
        return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}, bound

    return ask


def requests(metrics):
    """By method, route and status."""
    seen = samples(metrics.render().decode())
    return {(*its,): n for (name, *its), n in seen.items() if name == "waterfall_http_requests_total"}


@pytest.mark.parametrize("given", ["7", "call-1.2_3:4/5+6=", "x" * 128])
async def test_request__with_a_sane_id__keeps_it_in_answer_and_log(ask, given):
    _, headers, bound = await ask(x_request_id=given)
    assert headers["x-request-id"] == bound["request_id"] == given
    assert structlog.contextvars.get_contextvars() == {}, "it is bound for this request only"


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\nb", 'a"b', "ä", "a\x1b[31m"])
async def test_request__without_a_sane_id__gets_one_of_its_own(ask, given):
    _, headers, bound = await ask(x_request_id=given)
    assert headers["x-request-id"] == bound["request_id"] != given
    assert len(headers["x-request-id"]) == 32
    assert (await ask())[1]["x-request-id"] != headers["x-request-id"]


async def test_request__that_fails__is_followed_too(ask, metrics):
    with pytest.raises(RuntimeError):
        await ask("/hello/bad", x_request_id="7")
    assert requests(metrics) == {("GET", "/hello/{name}", "500"): 1}


async def test_requests__by_whatever_path_and_method__make_no_new_labels(ask, metrics):
    await ask("/hello/ada")
    await ask("/hello/bob")
    for number in range(3):
        assert (await ask(f"/strange/{number}"))[0] == 404
        await ask(f"/strange/{number}", method=f"STRANGE{number}")
    with pytest.raises(OSError):  # noqa: PT011 - the connection's
        await ask(leave=True)
    assert requests(metrics) == {
        ("GET", "/hello/{name}", "200"): 3,
        ("GET", "other", "404"): 3,
        ("other", "other", "404"): 3,
    }
