"""The local model, as the gateway uses it."""

import asyncio
import hashlib
import importlib.util
import json
import os
import time
from types import SimpleNamespace

import aiohttp
import pytest

from waterfall.devnet import llm
from waterfall.devnet.llm import MODEL, LocalModel, assemble
from waterfall.errors import SettingsError

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


async def complete(model, **fields):
    body = {"model": MODEL, "messages": QUESTION, "temperature": 0} | fields
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{model.base_url}/chat/completions", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        return await response.text()


async def answer(model, **fields):
    return json.loads(await complete(model, **fields))


async def chunks(model, **fields):
    events = (await complete(model, stream=True, **fields)).strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


async def test_model__asked__answers_and_counts(tmp_path):
    async with LocalModel(tmp_path) as model:
        said = await answer(model, max_tokens=16)
        assert said["model"] == MODEL
        assert said["choices"][0]["message"]["content"].strip()
        assert said["usage"]["prompt_tokens"] > said["usage"]["completion_tokens"] > 0
        assert said["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}

        again = await answer(model, max_tokens=16)
        assert again["usage"]["prompt_tokens"] == said["usage"]["prompt_tokens"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0

        for limit in ("max_tokens", "max_completion_tokens"):
            cut = await answer(model, **{limit: 1})
            assert (cut["usage"]["completion_tokens"], cut["choices"][0]["finish_reason"]) == (1, "length")

        plain = await chunks(model, max_tokens=4)
        assert all("usage" not in chunk for chunk in plain)
        assert plain[-1]["choices"][0]["finish_reason"] is not None
        counted = await chunks(model, max_tokens=4, stream_options={"include_usage": True})
        assert counted[-1]["choices"] == []
        assert 0 < counted[-1]["usage"]["completion_tokens"] <= 4
        assert all("usage" not in chunk for chunk in counted[:-1])

        at_once = await asyncio.gather(*(answer(model, max_tokens=8, seed=seed) for seed in range(6)))
        assert all(0 < one["usage"]["completion_tokens"] <= 8 for one in at_once)
        pid = model.child.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_model__extra_not_installed__says_how_to_install_it(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else find(name))
    with pytest.raises(SettingsError, match=r"pip install 'waterfall-credits\[demo\]'"):
        await LocalModel(tmp_path).start()


# ── The model's file ─────────────────────────────────────────────────────────────────────────────────

CONTENT = [b"first " * 100_000, b"second" * 300_000]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package of the same make."""
    paths = []
    for number, content in enumerate(CONTENT):
        paths.append(tmp_path / f"part{number}")
        paths[-1].write_bytes(content)
    fake = SimpleNamespace(
        MODEL_NAME="model.gguf",
        EXPECTED_SHA256=hashlib.sha256(b"".join(CONTENT)).hexdigest(),
        chunk_paths=lambda: paths,
    )
    monkeypatch.setattr(llm, "_import", lambda _: fake)
    return fake


def test_assemble__first_time__writes_the_whole_file_and_tells(tmp_path, package):
    told = []
    path = assemble(tmp_path / "cache", lambda done, total: told.append((done, total)))
    assert path.read_bytes() == b"".join(CONTENT)
    total = sum(map(len, CONTENT))
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert [file.name for file in path.parent.iterdir()] == ["model.gguf"]


def test_assemble__file_there__is_not_written_again(tmp_path, package):
    path = assemble(tmp_path / "cache")
    written = path.stat().st_mtime_ns
    package.chunk_paths = lambda: pytest.fail("read again")
    assert assemble(tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == written


def test_assemble__packages_damaged__leaves_nothing(tmp_path, package):
    package.EXPECTED_SHA256 = "00" * 32
    with pytest.raises(SettingsError, match="damaged"):
        assemble(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_assemble__left_over_of_a_cut_attempt__is_removed(tmp_path, package):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, age in (("old.partial", 7200), ("running.partial", 1)):
        (cache / name).write_bytes(b"half")
        moment = time.time() - age
        os.utime(cache / name, (moment, moment))
    assemble(cache)
    assert sorted(file.name for file in cache.iterdir()) == ["model.gguf", "running.partial"]


def test_assemble__cache_is_a_file__says_so(tmp_path, package):
    (tmp_path / "cache").write_text("")
    with pytest.raises(SettingsError, match="cannot be written to"):
        assemble(tmp_path / "cache")
