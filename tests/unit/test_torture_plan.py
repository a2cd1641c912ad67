"""The plan of a torture run, and what the command refuses before anything runs."""

import asyncio
import io
import json
import signal
import tempfile
from collections import defaultdict
from contextlib import suppress
from types import SimpleNamespace

import aiohttp
import pytest
from rich.console import Console
from typer.testing import CliRunner

from waterfall import failpoints
from waterfall.cli import logs, output
from waterfall.cli import torture as command
from waterfall.cli.app import app
from waterfall.errors import SettingsError
from waterfall.torture import check
from waterfall.torture import plan as plans
from waterfall.torture import upstream as provider
from waterfall.torture.calls import Call
from waterfall.torture.faults import Faults
from waterfall.torture.plan import BY_NAME, FAULTS, Step
from waterfall.torture.run import Outcome
from waterfall.torture.service import Service
from waterfall.torture.upstream import Upstream, content

CLUSTER = ["gateway-1", "gateway-2", "relayer-1", "relayer-2"]


def draw(seed=1, *, seconds=600, every=3, names=(), database="sqlite", processes=("serve",), nodes=2):
    faults = plans.choose(names, database)
    return plans.draw(seed, seconds=seconds, every=every, faults=faults, processes=processes, nodes=nodes)


def run(*arguments):
    done = CliRunner().invoke(app, ["torture", *arguments])
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done.exit_code, done.output


# ── Plan ─────────────────────────────────────────────────────────────────────────────────────────────


def test_draw__same_seed__same_plan_another_seed_another():
    assert draw(1) == draw(1) != draw(2)


def test_draw__ten_minutes__a_fault_every_few_seconds_of_every_kind_and_over_in_time():
    plan = draw(seconds=600, every=3)
    assert 170 < len(plan) < 230
    assert {step.fault for step in plan} == {fault.name for fault in plans.choose((), "sqlite")}
    assert all(step.at > 0 and step.at + step.seconds <= 600 for step in plan)
    assert [step.at for step in plan] == sorted(step.at for step in plan)


@pytest.mark.parametrize("seed", range(5))
def test_draw__any_seed__no_two_faults_have_the_same_at_one_time(seed):
    busy = {}
    for step in draw(seed, every=0.3, database="postgresql", processes=CLUSTER):
        for target in step.target.split(", "):
            assert busy.get(target, 0) <= step.at + 0.01, f"{step} meets another fault"
            busy[target] = step.at + step.seconds + BY_NAME[step.fault].rest


def test_draw__cluster__every_process_and_every_node_is_hit():
    targets = {step.target for step in draw(every=1, database="postgresql", processes=CLUSTER)}
    assert targets >= {*CLUSTER, "node 0", "node 1", "node 0, node 1", "mining", "database"}


def test_draw__failpoint__is_one_that_its_process_can_get_to():
    plan = draw(every=0.5, names=["failpoint"], database="postgresql", processes=CLUSTER)
    families = defaultdict(set)
    for step in plan:
        families[step.target.partition("-")[0]].add(step.detail["point"].partition(".")[0])
    assert families == {"gateway": {"call"}, "relayer": {"indexer", "lane"}}
    points = {step.detail["point"].partition(":")[0] for step in draw(every=0.5, names=["failpoint"])}
    assert points == failpoints.NAMES, "one process for all gets to all"


def test_choose__database__only_faults_that_it_can_have():
    names = {kind: {fault.name for fault in plans.choose((), kind)} for kind in ("sqlite", "postgresql")}
    assert names["postgresql"] - names["sqlite"] == {"backends-ended"}
    assert names["postgresql"] == {fault.name for fault in FAULTS}


@pytest.mark.parametrize(
    ("name", "database", "said"),
    [("kil", "sqlite", "no fault 'kil'"), ("backends-ended", "sqlite", "needs a postgresql database")],
)
def test_choose__name_that_cannot_be__says_why(name, database, said):
    with pytest.raises(SettingsError, match=said):
        plans.choose([name], database)


# ── What a run proves ────────────────────────────────────────────────────────────────────────────────


def step(fault, **detail):
    return Step(0, fault, 0, "serve", detail)


@pytest.fixture
def service(tmp_path):
    return Service("serve", "serve", tmp_path / "waterfall.toml", {})


async def carried_out(service, *steps):
    world = SimpleNamespace(services={"serve": service}, nodes=[], upstream=Upstream())
    faults = Faults(world)
    await faults.run(steps, asyncio.get_running_loop().time())
    return faults


def ended(service, point, code):
    """Its process has ended, which was started to die at a failpoint."""
    log = service.config.parent / "log"
    log.touch()
    service._ended(SimpleNamespace(log=log, code=code), point, was_up=True)  # noqa: SLF001


async def test_faults__failpoint__counts_once_a_process_has_died_there(service):
    faults = await carried_out(service, step("failpoint", point="call.held:2"), step("upstream-429"))
    assert faults.done == {"upstream-429": 1}
    ended(service, "call.held:2", -signal.SIGKILL)
    assert faults.done == {"upstream-429": 1, "failpoint": 1}


async def test_faults__process_killed_before_its_failpoint__is_not_counted(service):
    faults = await carried_out(service, step("failpoint", point="call.held:2"))
    service._why = "kill"  # noqa: SLF001 - as a later fault does
    ended(service, "call.held:2", -signal.SIGKILL)
    assert not sum(faults.done.values())


@pytest.mark.parametrize(
    "event", ["unexpected", "halted", "bound broken", "sums did not add up at the start"]
)
def test_log__line_that_no_fault_excuses__is_a_finding(service, event):
    log = service.config.parent / "log"
    log.write_text(logs._json({"event": event, "level": "error"}, default=repr) + "\n")  # noqa: SLF001
    service._look_through(SimpleNamespace(log=log))  # noqa: SLF001
    assert [event in finding for finding in service.findings] == [True]


async def test_faults__one_that_cannot_be_done__is_a_finding(service, monkeypatch):
    def refuse(*_):
        raise OSError("no such process")

    monkeypatch.setattr(service, "signal", refuse)
    faults = await carried_out(service, step("kill"), step("upstream-500"))
    assert faults.done == {"upstream-500": 1}
    (found,) = faults.findings
    assert "the fault kill of serve could not be done: OSError('no such process')" in found


def calls(**outcomes):
    """Calls that ended so, so many of each."""
    ends = [outcome for outcome, count in outcomes.items() for _ in range(count)]
    return [Call(n, "account", "whole", f"hash {n}", 1, outcome=end) for n, end in enumerate(ends)]


@pytest.mark.parametrize(
    ("calls", "faults", "said"),
    [
        (calls(answered=5, refused=95), {"kill": 1}, []),
        (calls(answered=4, refused=96), {"kill": 1}, ["only 4 of 100 calls were answered"]),
        (calls(broken=1), {"kill": 1}, ["only 0 of 1 calls were answered"]),
        ([], {"kill": 1}, ["only 0 of 0 calls were answered"]),
        (calls(answered=5), {}, ["no fault was done"]),
        (calls(answered=5), {"kill": 0}, ["no fault was done"]),
    ],
)
def test_shortfalls__calls_and_faults__too_few_of_either_prove_nothing(calls, faults, said):
    assert list(check.shortfalls(calls, faults)) == said


@pytest.mark.parametrize(
    ("lost", "stops", "is_found"),
    [
        (2, 0, False),  # the provider did not bring them to their end
        (3, 0, True),
        (2 + 2 * 4 + 1, 2, False),  # four under way at each stop, and one whose client had left
        (2 + 2 * 4 + 1 + 1, 2, True),
    ],
)
def test_lost__calls__no_more_than_provider_and_stops_explain(lost, stops, is_found):
    upstream = Upstream()
    upstream.started.update(range(20))
    upstream.whole.update(range(2, 20))
    records = [SimpleNamespace(settlement=SimpleNamespace(state="lost"))] * lost
    evidence = check.Evidence(
        None, None, "", (), calls(left=1, answered=3), upstream, most_at_once=4, stops=stops
    )
    assert bool(list(check._lost(evidence, records))) is is_found  # noqa: SLF001


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("mode", "is_whole"), [(None, True), ("cut", False), ("500", False)])
async def test_upstream__answer__is_whole_if_it_was_brought_to_its_end(monkeypatch, mode, is_whole, stream):
    monkeypatch.setattr(provider, "_FAILS", 1)
    body = {"model": "m", "messages": [{"content": content(7)}], "max_tokens": 5, "stream": stream}
    async with Upstream(mode) as upstream, aiohttp.ClientSession() as session:
        with suppress(aiohttp.ClientError):
            async with session.post(f"{upstream.base_url}/chat/completions", json=body) as response:
                await response.read()
        assert (upstream.whole == {7}, set(upstream.started)) == (is_whole, {7})


# ── Command ──────────────────────────────────────────────────────────────────────────────────────────


def test_dry_run__seed__prints_the_same_plan_and_makes_nothing(tmp_path):
    wanted = "--dry-run", "--seed", "7", "--minutes", "1", "--json", "--keep", str(tmp_path / "new")
    code, first = run(*wanted)
    assert code == 0
    assert json.loads(first)["seed"] == 7
    assert json.loads(first)["plan"] == json.loads(json.dumps([s.as_dict() for s in draw(7, seconds=60)]))
    assert run(*wanted) == (0, first)
    assert not (tmp_path / "new").exists()


def test_only__names__no_other_fault_is_planned():
    _, printed = run("--dry-run", "--seed", "7", "--json", "--only", "kill,reorg")
    assert {step["fault"] for step in json.loads(printed)["plan"]} == {"kill", "reorg"}


def test_list__all_faults__with_what_they_do():
    code, printed = run("--list")
    assert code == 0
    assert all(fault.name in printed and fault.what in printed for fault in FAULTS)


def test_help__says_what_it_touches():
    code, printed = run("--help")
    assert code == 0
    assert "Touches nothing but its own folder" in " ".join(printed.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--only", "earthquake"], 1, "there is no fault 'earthquake'"),
        (["--only", "backends-ended"], 1, "backends-ended needs a postgresql database"),
        (["--database", "mysql://host/name"], 1, "must be sqlite:///FILE or postgresql://"),
        (["--database", "sqlite:relative"], 1, "must be sqlite:///FILE or postgresql://"),
        (["--minutes", "0"], 2, "--minutes"),
        (["--every", "0"], 2, "--every"),
        (["--accounts", "0"], 2, "--accounts"),
        (["--seed", "-1"], 2, "--seed"),
    ],
)
def test_option__wrong__is_refused_before_anything_runs(arguments, code, said):
    found, printed = run("--dry-run", *arguments)
    assert (found, said in printed) == (code, True), printed


def test_keep__folder_with_something_in_it__stays_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    code, printed = run("--keep", str(tmp_path), "--minutes", "0.1")
    assert (code, "not an empty folder" in " ".join(printed.split())) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("differences", "code", "said"),
    [([], 0, "Equal: 3 charges of 0.000000000007 USD"), (["charge 7 is not on the chain"], 1, "charge 7")],
)
def test_torture__what_the_run_comes_to__is_its_exit_code_and_what_stays(
    tmp_path, monkeypatch, differences, code, said
):
    asked = []

    async def ended(options, _):
        asked.append(options)
        counts = {"one": 1}
        return Outcome(
            seed=options.seed,
            seconds=options.seconds,
            drained_in=1.5,
            differences=differences,
            charged=3,
            amount=7,
            **dict.fromkeys(
                ("calls", "repeats", "states", "reasons", "transactions", "faults", "harm", "ends"), counts
            ),
            provider=counts,
            people=counts,
        )

    printed = Console(file=io.StringIO(), width=140)
    monkeypatch.setattr(command, "out", printed)
    monkeypatch.setattr(output, "out", printed)
    monkeypatch.setattr(command, "run", ended)
    monkeypatch.setattr(command.logs, "configure", lambda _: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found, told = run("--seed", "5", "--minutes", "0.1")
    (options,) = asked
    assert found == code
    assert said in printed.file.getvalue()
    assert "Seed 5" in told
    assert options.database == f"sqlite:///{options.folder}/waterfall.db"
    assert options.folder.exists() is bool(differences)
    if differences:
        assert str(options.folder) in "".join(told.split())
        assert json.loads((options.folder / "outcome.json").read_text())["differences"] == differences
