"""Starting, stopping, and starting again: nothing runs on, nothing is lost, nothing of another is touched."""

import json
import signal
import socket
import subprocess
from urllib.parse import urlparse

import pytest
from dev_process import ENVIRONMENT, WATERFALL, processes_in, wait_until, waterfall_dev


def is_open(url: str) -> bool:
    parsed = urlparse(url)
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((parsed.hostname, parsed.port)) == 0


def test_stop__by_ctrl_c__leaves_nothing_and_the_next_start_goes_on(tmp_path):
    with waterfall_dev(tmp_path, "--no-llm") as first:
        first.command("accounts", "fund", first.facts["account"], "1.25")
        assert len(first.children()) == 1
        assert first.stop(signal.SIGINT) == 0
        assert first.children() == set()
        assert not is_open(first.facts["gateway_url"])
        assert not is_open(first.facts["rpc_url"])
    with waterfall_dev(tmp_path, "--no-llm") as second:
        assert second.facts["admin_key"] == first.facts["admin_key"]
        shown = json.loads(second.command("accounts", "show", second.facts["account"], "--json"))
        assert (shown["id"], shown["balance"]) == (first.facts["account"], "101.25")


def test_stop__by_sigkill__leaves_no_chain_behind_and_loses_nothing(tmp_path):
    with waterfall_dev(tmp_path, "--no-llm") as first:
        first.command("accounts", "fund", first.facts["account"], "1.25")
        assert len(first.children()) == 1
        first.stop(signal.SIGKILL)
        wait_until(lambda: first.children() == set())
    with waterfall_dev(tmp_path, "--no-llm") as second:
        shown = json.loads(second.command("accounts", "show", second.facts["account"], "--json"))
        assert shown["balance"] == "101.25"
    rebuilt = json.loads(second.command("rebuild", "--json"))
    assert rebuilt["balance"] == "101.25"


def test_start__in_a_folder_in_use__says_so_and_leaves_it_alone(tmp_path):
    with waterfall_dev(tmp_path, "--no-llm") as first:
        for arguments in (("dev", "--no-llm"), ("dev", "--no-llm", "--fresh"), ("rebuild",)):
            said = first.command(*arguments, fails=True)
            assert f"process {first.process.pid} is using .waterfall: stop it first" in said
            assert said.count("\n") == 1
        assert (tmp_path / ".waterfall/waterfall.db").exists()
        assert len(first.children()) == 1
        assert first.facts["account"] in first.command("accounts", "list")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "stage", ["lock", "anvil.pid", "model.pid", "model.port", "waterfall.db", "keys.json", "dev.json"]
)
def test_start__signal_at_any_stage__ends_it_and_its_children(tmp_path, stage, number):
    command = [WATERFALL, "dev", "--port", "0"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_until((tmp_path / ".waterfall" / stage).exists)
            process.send_signal(number)
            said = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    ran = "Waterfall runs" in said
    assert process.returncode == (0 if ran else 130), said
    assert ran or stage != "dev.json", said
    assert "Traceback" not in said, said
    wait_until(lambda: processes_in(tmp_path) == set())
    assert not (tmp_path / ".waterfall/dev.json").exists()


def test_stop__by_two_ctrl_c__ends_model_and_chain_without_a_word(tmp_path):
    with waterfall_dev(tmp_path) as running:
        assert len(running.children()) == 2
        running.process.send_signal(signal.SIGINT)
        wait_until(lambda: "Stopping" in (tmp_path / "dev.out").read_text())
        assert running.stop(signal.SIGINT) == 0
        assert running.children() == set()
        assert (tmp_path / "dev.out").read_text().endswith("Stopping …\n")


def test_ledger__elsewhere__is_rebuilt_and_forgotten_with_its_chain(tmp_path):
    (tmp_path / "own.toml").write_text('database = "sqlite:///own.db"\n[gateway]\nhost = "::1"\n')
    with waterfall_dev(tmp_path, "--config", "own.toml") as first:
        assert first.facts["gateway_url"].startswith("http://[::1]:")
        first.command("accounts", "fund", first.facts["account"], "1.25")
        first.stop()
    assert json.loads(first.command("rebuild", "--json"))["balance"] == "101.25"
    assert not (tmp_path / ".waterfall/waterfall.db").exists()
    with waterfall_dev(tmp_path, "--fresh", "--no-llm") as second:
        assert not (tmp_path / "own.db").exists()
        shown = json.loads(second.command("accounts", "show", second.facts["account"], "--json"))
        assert shown["balance"] == "100.00"


def test_rebuild__no_chain__is_refused_and_starts_none(tmp_path):
    done = subprocess.run(
        [WATERFALL, "rebuild"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "there is no local chain in .waterfall" in done.stderr
    assert not (tmp_path / ".waterfall/chain.json").exists()
