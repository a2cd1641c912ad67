"""What a newcomer does: start everything, call a model, read a receipt."""

import json

import anthropic
import openai
import pytest
from dev_process import ENVIRONMENT, wait_until, waterfall_dev


def until_settled(dev, receipt_id: str) -> dict:
    shown: dict = {}

    def settled() -> bool:
        shown.update(json.loads(dev.command("receipts", "show", receipt_id, "--json")))
        return shown["status"] in {"settled", "final"}

    wait_until(settled)
    return shown


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    with waterfall_dev(tmp_path_factory.mktemp("dev")) as running:
        yield running


def test_dev__facts__are_complete(dev):
    assert set(dev.facts) >= {
        *("gateway_url", "rpc_url", "chain_id", "vault", "token"),
        *("platform", "admin_key", "account", "account_key"),
    }
    assert (dev.folder / ".waterfall/dev.json").stat().st_mode & 0o777 == 0o600


def test_receipt__of_a_real_model__verifies_and_tampered_fails(dev):
    client = openai.OpenAI(base_url=dev.facts["gateway_url"] + "/v1", api_key=dev.facts["account_key"])
    answer = client.chat.completions.with_raw_response.create(
        model=dev.facts["model"], messages=[{"role": "user", "content": "Say hello."}], max_tokens=16
    )
    assert answer.parse().usage.prompt_tokens > 0
    receipt_id = answer.headers["x-waterfall-receipt-id"]
    receipt = until_settled(dev, receipt_id)

    assert receipt["transaction"] in dev.command("receipts", "verify", receipt_id)
    file = dev.folder / "receipt.json"
    file.write_text(json.dumps(receipt["receipt"]))
    dev.command("receipts", "verify", "receipt.json")

    for field, value, reason in (
        ("amount", "0.000001", "the digest is not that of the receipt's fields"),
        ("output_tokens", 1, "the digest is not that of the receipt's fields"),
    ):
        tampered = json.loads(json.dumps(receipt["receipt"]))
        tampered["receipt"][field] = value
        file.write_text(json.dumps(tampered))
        assert reason in dev.command("receipts", "verify", "receipt.json", fails=True)
    tampered = json.loads(json.dumps(receipt["receipt"]))
    tampered["usage"]["completion_tokens"] += 1
    file.write_text(json.dumps(tampered))
    assert "usage object" in dev.command("receipts", "verify", "receipt.json", fails=True)
    tampered = json.loads(json.dumps(receipt["receipt"]))
    tampered["rate_card"]["rates"][0]["output_usd_per_mtok"] = "0.41"
    file.write_text(json.dumps(tampered))
    assert "rate card" in dev.command("receipts", "verify", "receipt.json", fails=True)


HELLO = [{"role": "user", "content": "Say hello."}]


def test_responses__of_a_real_model__is_answered_and_its_receipt_verifies(dev):
    client = openai.OpenAI(base_url=dev.facts["gateway_url"] + "/v1", api_key=dev.facts["account_key"])
    answer = client.responses.with_raw_response.create(
        model=dev.facts["model"], input="Say hello.", max_output_tokens=16
    )
    said = answer.parse()
    assert said.output_text.strip()
    receipt = until_settled(dev, answer.headers["x-waterfall-receipt-id"])
    assert receipt["receipt"]["receipt"]["output_tokens"] == said.usage.output_tokens > 0
    dev.command("receipts", "verify", receipt["id"])

    events = list(
        client.responses.create(
            model=dev.facts["model"], input="Say hello.", max_output_tokens=16, stream=True
        )
    )
    assert events[-1].type == "response.completed"
    billed = events[-1].model_extra["waterfall"]
    assert until_settled(dev, billed["receipt_id"])["cost"] == billed["cost"]
    dev.command("receipts", "verify", billed["receipt_id"])


def test_messages__of_a_real_model__is_answered_and_its_receipt_verifies(dev):
    client = anthropic.Anthropic(base_url=dev.facts["gateway_url"], api_key=dev.facts["account_key"])
    answer = client.messages.with_raw_response.create(model=dev.facts["model"], messages=HELLO, max_tokens=16)
    said = answer.parse()
    assert said.content[0].text.strip()
    receipt = until_settled(dev, answer.headers["x-waterfall-receipt-id"])
    assert receipt["receipt"]["receipt"]["output_tokens"] == said.usage.output_tokens > 0
    dev.command("receipts", "verify", receipt["id"])

    asked = {"model": dev.facts["model"], "messages": HELLO}
    read = said.usage.input_tokens + (said.usage.cache_read_input_tokens or 0)
    assert client.messages.count_tokens(**asked).input_tokens == read
    events = list(client.messages.create(**asked, max_tokens=16, stream=True))
    (last,) = [event for event in events if event.type == "message_delta"]
    billed = last.model_extra["waterfall"]
    assert until_settled(dev, billed["receipt_id"])["cost"] == billed["cost"]
    dev.command("receipts", "verify", billed["receipt_id"])
    assert [model.id for model in client.models.list()] == [dev.facts["model"]]


def test_stream__of_a_real_model__is_charged_in_full_though_the_client_leaves(dev):
    client = openai.OpenAI(base_url=dev.facts["gateway_url"] + "/v1", api_key=dev.facts["account_key"])
    with client.chat.completions.with_streaming_response.create(
        model=dev.facts["model"],
        messages=[{"role": "user", "content": "Count from one to twenty."}],
        max_tokens=48,
        stream=True,
    ) as stream:
        receipt_id = stream.headers["x-waterfall-receipt-id"]
        next(stream.iter_lines())
    receipt = until_settled(dev, receipt_id)
    assert receipt["receipt"]["receipt"]["complete"] is True
    assert (
        receipt["receipt"]["receipt"]["output_tokens"] == receipt["receipt"]["usage"]["completion_tokens"] > 0
    )
    dev.command("receipts", "verify", receipt_id)


def test_accounts__made_and_funded_by_the_command__can_pay(dev):
    account = json.loads(dev.command("accounts", "create", "agent 7", "--json"))
    funded = json.loads(dev.command("accounts", "fund", account["id"], "2.50", "--json"))
    assert funded["balance"] == "2.50"
    key = json.loads(dev.command("keys", "create", account["id"], "--json"))["key"]
    client = openai.OpenAI(base_url=dev.facts["gateway_url"] + "/v1", api_key=key, max_retries=0)
    model = dev.facts["model"]
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=4)

    dev.command("policy", "set", account["id"], "--max-per-charge", "0")
    with pytest.raises(openai.APIStatusError) as refusal:
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=4
        )
    assert (refusal.value.status_code, refusal.value.body["code"]) == (402, "limit_exceeded")
    assert "0.00 USD per charge" in dev.command("policy", "show", account["id"])
    assert account["id"] in dev.command("accounts", "list")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("accounts", "show", "0x" + "00" * 32), "There is no account"),
        (("accounts", "fund", "0x" + "00" * 32, "abc"), "not a plain decimal"),
        (("accounts", "fund", "0x" + "00" * 32, "0.0000001"), "not a whole number"),
        (("receipts", "verify", "0123"), "There is no receipt"),
        (("accounts", "list", "--key", "wf_wrong"), "No valid API key"),
        (("accounts", "list", "--url", "http://127.0.0.1:1"), "No gateway answers"),
        (("serve", "--config", "missing.toml"), "missing.toml"),
    ],
)
def test_command__wrong__says_so_in_one_line(dev, arguments, says):
    said = dev.command(*arguments, fails=True)
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"platform": 7}, "the vault has no platform 7"),
        ({"vault": "0x" + "11" * 20}, "there is no CreditVault at 0x1111"),
        ({}, "has only 0.00 USDC"),
    ],
)
def test_fund__from_a_wallet_that_cannot__says_why_before_it_approves(dev, monkeypatch, changed, says):
    chain = {name: dev.facts[name] for name in ("rpc_url", "chain_id", "vault")} | {
        "platform": int(dev.facts["platform"]),
        **changed,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in chain.items()]
    (dev.folder / "chain.toml").write_text("\n".join(["[chain]", *lines]))
    monkeypatch.setitem(ENVIRONMENT, "WALLET", "ab" * 32)
    arguments = ("accounts", "fund", dev.facts["account"], "1", "--wallet", "env:WALLET")
    assert says in dev.command(*arguments, "--config", "chain.toml", fails=True)


def test_accounts__hostile_label__is_listed_as_it_is(dev):
    dev.command("accounts", "create", "[/x]\x1b[31m")
    assert "[/x]\\x1b[31m" in dev.command("accounts", "list")
