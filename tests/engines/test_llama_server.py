"""llama-server, where MODEL_COMPOSE_LLAMA_SERVER names one: the embedded engine's answers, and no blend in another's cache.

What every engine promises is in tests/contracts; turns, command line and refusals need no server.
"""

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from pydantic import ValidationError

from model_compose.engines import Engine
from model_compose.engines.llamacpp.llama import Settings
from model_compose.engines.llamacpp.server import ServerEngine, command
from model_compose.engines.llamacpp.slots import Slots
from model_compose.engines.served import child
from model_compose.errors import InputError, LoadError, NotReady, Overloaded, RunError
from model_compose.generation import Request, ResponseFormat, Sampling
from model_compose.lora.blend import Blend
from model_compose.lora.methods.svd import Svd
from model_compose.progress import silent
from tests import gguf_base
from tests.contracts.test_engine import BLENDS, KNOWN, make, text
from tests.engines.test_child import alive, start_when_told
from tests.engines.test_llamacpp import ENDLESS, PROMPTS, answer, check_split, distance, logprobs, save_wide
from tests.waiting import SECONDS, until

needs_server = pytest.mark.skipif(
    bool(KNOWN["llama-server"].missing), reason=KNOWN["llama-server"].missing or "there is one"
)
LONG = "The same beginning of many tokens. " * 4


async def opened(folder: Path, driver: str = "llama-server", **changes: Any) -> Any:
    engine = make(driver, folder, **{"model": "./base.gguf", **changes})
    await engine.open(silent)
    return engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[ServerEngine, Engine]]:
    """llama-server with adapters on every kind of module, and the embedded engine."""
    folder = tmp_path_factory.mktemp("llama-server")
    save_wide(folder, ["lm_head", "embed_tokens"])
    ours, reference = await opened(folder), await opened(folder, "huggingface")
    yield ours, reference
    await ours.close()
    await reference.close()


@pytest.fixture
async def engine(project: Path) -> AsyncIterator[ServerEngine]:
    made = await opened(project.parent)
    yield made
    await made.close()


def pid_of(engine: ServerEngine) -> int:
    """The server's own, which is the watcher's child."""
    assert engine._child is not None
    assert engine._child._process is not None
    watcher = engine._child._process.pid
    return int(Path(f"/proc/{watcher}/task/{watcher}/children").read_text().split()[0])


@needs_server
@pytest.mark.asyncio(loop_scope="module")
async def test_log_probabilities_are_the_embedded_engines_within_the_noise_of_the_bare_base(
    engines: tuple[ServerEngine, Engine],
) -> None:
    """Of the whole vocabulary, those of tokens that end within a character among them."""
    noise = await distance(*engines, Blend())
    assert noise < 1e-5
    for blend in ({"alpaca": 1.0}, {"pirate": 1.5}, {"alpaca": 0.7, "pirate": -0.8}):
        assert await distance(*engines, Blend(blend)) <= 3 * noise
        plain, blended = [await logprobs(engines[0], "Hello", Blend(weights)) for weights in ({}, blend)]
        assert max(abs(plain[token] - blended[token]) for token in plain) > 10 * noise


@needs_server
@pytest.mark.asyncio(loop_scope="module")
async def test_greedy_texts_of_all_blends_at_once_are_the_embedded_engines(
    engines: tuple[ServerEngine, Engine],
) -> None:
    asked = [(prompt, blend) for prompt in PROMPTS for blend in BLENDS]
    ours = await asyncio.gather(*(text(engines[0], *each, Sampling(40, 40, do_sample=False)) for each in asked))
    assert ours == [await text(engines[1], *each, Sampling(40, 40, do_sample=False)) for each in asked]
    for sampling in (
        Sampling(24, 24, do_sample=False, repetition_penalty=1.7),
        Sampling(24, 24, do_sample=False, presence_penalty=2.0, frequency_penalty=1.5),
        Sampling(24, 24, do_sample=False, logit_bias=((50, 100.0),)),
        Sampling(40, 21, do_sample=False, logit_bias=((1, 4.0),)),  # an end is likely, and may not come before
        Sampling(24, 24, temperature=0.0),
    ):
        one, other = [await answer(engine, "Hello", BLENDS[1], sampling) for engine in engines]
        assert one.texts == other.texts, sampling


@needs_server
@pytest.mark.asyncio(loop_scope="module")
async def test_draws_follow_the_embedded_engines_filters(engines: tuple[ServerEngine, Engine]) -> None:
    """The same tokens can be drawn, and as often: 200 draws each, of at most 5 tokens."""
    filters: dict[str, Any] = {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.05}
    sampling = Sampling(1, seed=1, num_return_sequences=200, logprobs=0, **filters)
    counts = []
    for engine in engines:
        completion = await answer(engine, "0123456789 ", BLENDS[1], sampling)
        counts.append(Counter(each.logprobs[0].logprob.__round__(3) for each in completion.texts))
    assert counts[0].keys() == counts[1].keys()
    assert len(counts[0]) > 1
    for token, count in counts[0].items():
        assert abs(count - counts[1][token]) < 4 * (count + counts[1][token]) ** 0.5


@needs_server
@pytest.mark.parametrize("slots", [1, 8])
async def test_a_prefix_serves_its_own_blend_alone(project: Path, slots: int) -> None:
    """Changing a weight changes the answer, and the first blend then gives its first answer again."""
    engine = await opened(project.parent, options={"max_batch_size": slots})
    sampling = Sampling(16, 16, do_sample=False, logprobs=3)
    variants = [{}, {"alpaca": 1.0}, {"alpaca": 1.01}, {"alpaca": -1.0}, {"alpaca": 1.0, "pirate": 0.5}]
    blends = [Blend(weights) for weights in variants]
    first = [await answer(engine, LONG, blend, sampling) for blend in blends]
    assert [each.usage.cached_tokens for each in first] == [0] * len(blends)
    for one, other in pairwise(first):
        assert one.texts != other.texts
    again = [await answer(engine, LONG, blend, sampling) for blend in blends[::-1]]
    for one, other in zip(first[::-1], again, strict=True):
        assert [each.text for each in one.texts] == [each.text for each in other.texts]
        for a, b in zip(one.texts[0].logprobs, other.texts[0].logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
    cached = [each.usage.cached_tokens for each in again]
    assert cached == ([len(LONG) - 1] + [0] * (len(blends) - 1) if slots == 1 else [len(LONG) - 1] * len(blends))
    longer = await answer(engine, LONG + "And more.", blends[0], sampling)
    assert longer.usage.cached_tokens >= len(LONG)
    stats = engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (
        len(LONG) * 11 + len("And more."), sum(cached) + longer.usage.cached_tokens
    )  # fmt: skip
    await engine.close()


@needs_server
async def test_no_prompt_cache_brings_another_blends_keys_and_values(project: Path) -> None:
    """llama-server's own (--cache-ram, on by default) would here: it keeps prompts without the adapters that read them."""
    engine = await opened(project.parent, options={"max_batch_size": 1})
    one, other, sampling = Blend({"alpaca": 1.0}), Blend({"alpaca": -1.0}), Sampling(8, 8, do_sample=False, logprobs=0)
    first = await answer(engine, LONG, one, sampling)
    for prompt, blend in (("9876543210 " * 12, one), (LONG, other), ("9876543210 " * 12, one)):
        await answer(engine, prompt, blend, sampling)
    again = await answer(engine, LONG, one, sampling)
    assert (again.texts, again.usage.cached_tokens) == (first.texts, 0)
    await engine.close()


@needs_server
async def test_blends_take_turns_and_texts_of_one_share_them(engine: ServerEngine) -> None:
    """None of several endless texts waits for another's end."""
    streams = [engine.generate(Request("Hello", blend, ENDLESS)) for blend in (*BLENDS, *BLENDS)]
    for _ in range(5):
        for stream in streams:
            await anext(stream)
    for stream in streams:
        await stream.aclose()
    assert engine.stats() is not None


@needs_server
async def test_more_texts_than_slots_wait_and_too_many_are_answered_429(project: Path) -> None:
    engine = await opened(project.parent, options={"max_batch_size": 2, "max_queue": 6})
    alone = [await text(engine, f"Prompt {n}", BLENDS[n % 3]) for n in range(7)]
    together = await asyncio.gather(*(text(engine, f"Prompt {n}", BLENDS[n % 3]) for n in range(7)))
    assert together == alone
    streams = [engine.generate(Request("Hello", BLENDS[n % 3], ENDLESS)) for n in range(8)]
    waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await asyncio.wait(waiting[:2])
    with pytest.raises(Overloaded, match=r"8 texts run or wait already \(max_batch_size 2, max_queue 6\)"):
        await text(engine, "Hello")
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (2, 6)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    for stream in streams:
        await stream.aclose()
    assert await text(engine, "Prompt 0") == alone[0]
    assert engine.stats().running == 0
    await engine.close()


@needs_server
async def test_closing_a_stream_frees_the_servers_slot(engine: ServerEngine) -> None:
    async with aclosing(engine.generate(Request("Hello", BLENDS[1], ENDLESS))) as chunks:
        await anext(chunks)
    assert engine._connection is not None
    async with asyncio.timeout(SECONDS):
        while any(slot["is_processing"] for slot in (await engine._connection.client.get("/slots")).json()):
            await asyncio.sleep(0.02)


@needs_server
async def test_a_crash_fails_what_runs_and_the_server_comes_back(
    engine: ServerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "SHORTEST_PAUSE", 0.0)
    again = start_when_told(engine, monkeypatch)
    before = await answer(engine, LONG, BLENDS[1])
    running = engine.generate(Request("Hello", BLENDS[1], ENDLESS))
    await anext(running)
    os.kill(pid_of(engine), signal.SIGKILL)
    with pytest.raises(RunError, match="llama-server ended while it was generating; it is being started again"):
        async for _ in running:
            pass
    await until(lambda: not engine.up)
    with pytest.raises(NotReady, match="is being started again; try again in a moment"):
        await text(engine, "Hello")
    again.set()
    await until(lambda: engine.up)
    after = await answer(engine, LONG, BLENDS[1])
    assert (after.texts, after.usage.cached_tokens) == (before.texts, 0)


@needs_server
async def test_close_leaves_nothing(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine = await opened(project.parent)
    server = pid_of(engine)
    assert len(os.listdir(tmp_path)) == 1
    await engine.close()
    assert os.listdir(tmp_path) == []
    assert not alive(server)
    assert engine.stats() is None
    with pytest.raises(NotReady):
        await text(engine, "Hello")


@needs_server
async def test_a_base_that_it_cannot_load_is_refused_in_its_own_words(project: Path, tmp_path: Path) -> None:
    for name in ("alpaca", "pirate"):
        (tmp_path / name).symlink_to(project.parent / name)
    gguf_base.save_gguf(project.parent / "base", tmp_path / "base.gguf")
    whole = (tmp_path / "base.gguf").read_bytes()
    (tmp_path / "base.gguf").write_bytes(whole.replace(b"blk.1.attn_norm", b"blk.1.attn_nor7"))
    with pytest.raises(LoadError, match=r"ended before it was ready: .*blk.1.attn_norm.weight"):
        await opened(tmp_path)


@needs_server
async def test_a_split_base_is_the_whole(project: Path, tmp_path: Path) -> None:
    await check_split("llama-server", project, tmp_path)


@needs_server
async def test_what_it_cannot_do_exactly_is_the_requests_fault(engine: ServerEngine) -> None:
    for field, sampling in {
        "response_format": Sampling(response_format=ResponseFormat("json_object")),
        "repetition_penalty": Sampling(repetition_penalty=1.2, presence_penalty=1.0),
        "logit_bias": Sampling(repetition_penalty=1.2, logit_bias=((5, 1.0),)),
    }.items():
        with pytest.raises(InputError, match=f"llama-server cannot do this {field} exactly") as refused:
            await text(engine, "Hello", sampling=sampling)
        assert [each.field for each in refused.value.fields] == [field]
    with pytest.raises(InputError, match="is none of the file's"):
        await text(engine, "Hello", Blend({"alpaca": 1.0}, method=Svd(rank=2)))
    with pytest.raises(InputError, match="names the token 999, but this model has the tokens 0 to 258"):
        await text(engine, "Hello", sampling=Sampling(2, logit_bias=((999, 1.0),)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"start_timeout": 3}}, "'start_timeout' is for a llama-server"),
        ({"options": {"env": {"A": "1"}}}, "'env' is for a llama-server"),
        (
            {"options": {"server": "x"}, "allow_runtime_adapters": True},
            "'allow_runtime_adapters': llama-server loads adapters only when it starts",
        ),
        ({"options": {"server": "x", "base_url": "http://x"}}, "unknown key 'base_url'"),
    ],
    ids=str,
)
def test_options_that_it_cannot_honour_are_refused_by_name(changes: dict[str, Any], said: str, project: Path) -> None:
    with pytest.raises(ValidationError, match=said):
        make("llamacpp", project.parent, **{"model": "./base.gguf", **changes})


async def test_a_binary_that_is_not_there_or_does_not_serve_is_one_sentence(project: Path) -> None:
    for server, where in (("./nowhere", "that can be run"), ("no-such-llama-server", "in PATH")):
        with pytest.raises(LoadError, match=f"options.server: there is no {server} {where}; build llama.cpp's"):
            await opened(project.parent, "llamacpp", options={"server": server})
    with pytest.raises(LoadError, match=r"python\S* ended before it was ready: "):
        await opened(project.parent, "llamacpp", options={"server": sys.executable})


def test_the_command_line(tmp_path: Path) -> None:
    settings = Settings(256, 3, 64, 2, 0, kv_float32=True, flash_attention=False)
    loaded: Any = SimpleNamespace(settings=settings, base=Path("/m.gguf"), files=(Path("/0.gguf"), Path("/1.gguf")))
    line = " ".join(command(Path("/s"), loaded, Path("/llama.sock")))
    for part in (
        "--host /llama.sock", "--model /m.gguf", "--ctx-size 768", "--parallel 3", "--cache-type-k f32", "--flash-attn off",
        "--cache-ram 0", "--no-kv-unified", "--no-context-shift", "--lora /0.gguf,/1.gguf", "--device none",
    ):  # fmt: skip
        assert f"{part} " in f"{line} "


# Slots and turns.


async def order_of_turns(identities: Collection[str], turns: int, slots: Slots) -> list[str]:
    """Who computes, as it begins to. Each takes its turns one after the other."""
    order: list[str] = []

    async def run(identity: str) -> None:
        for _ in range(turns):
            async with slots.turn(identity):
                order.append(identity)
                await asyncio.sleep(0)

    await asyncio.gather(*(run(identity) for identity in identities))
    return order


async def test_one_blend_computes_at_once_and_that_which_waits_longest_is_next() -> None:
    slots = Slots(8)
    assert await order_of_turns("ab", 3, slots) == list("ababab")
    async with slots.turn("x"):
        waiting = asyncio.ensure_future(order_of_turns("aba", 2, slots))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert await waiting == list("aabaab")  # texts of a blend share its turn
    computing: list[str] = []

    async def run(identity: str) -> None:
        async with slots.turn(identity):
            computing.append(identity)
            assert len(set(computing)) == 1
            await asyncio.sleep(0)
            computing.remove(identity)

    await asyncio.gather(*(run(identity) for identity in "abbacabac" * 3))


async def test_one_that_leaves_while_it_waits_holds_up_nobody() -> None:
    slots = Slots(8)
    async with slots.turn("a"):
        waiting = [asyncio.ensure_future(order_of_turns(identity, 1, slots)) for identity in ("b", "a", "c")]
        await asyncio.sleep(0)
        waiting[0].cancel()
        assert await waiting[1] == ["a"]
    assert await asyncio.wait_for(waiting[2], SECONDS) == ["c"]


async def test_a_text_gets_the_slot_that_starts_as_it_does_under_its_own_blend() -> None:
    slots = Slots(3)
    for identity, tokens in (("a", [1, 2, 3]), ("b", [1, 2, 3, 4]), ("a", [1])):
        async with slots.take("new", []) as slot:
            slot.identity, slot.tokens = identity, tokens
    async with slots.take("a", [1, 2, 3, 4]) as first, slots.take("a", [1, 2, 3, 4]) as second:
        assert (first.number, second.number) == (0, 2)
        assert slots.used == [first, second]
    async with slots.take("c", [1, 2, 3, 4]) as oldest:
        assert oldest.number == 1
    slots.forget()
    async with slots.take("a", [1, 2, 3]) as slot:
        assert slot.identity == ""
