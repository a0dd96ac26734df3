"""What every engine promises. A new driver adds one line to DRIVERS and must pass all of it."""

import asyncio
import codecs
import importlib.util
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from model_compose.components.model import TextGenerationOptions
from model_compose.engines import ENGINES, Engine
from model_compose.engines.options import AdapterOptions
from model_compose.errors import Conflict, InputError
from model_compose.generation import Chunk, Message, Request, Sampling, collect
from model_compose.lora.blend import Blend
from model_compose.lora.methods.svd import Svd
from model_compose.progress import Progress, silent
from tests import gguf_base, tiny

pytestmark = pytest.mark.asyncio(loop_scope="module")  # some engines take half a minute to open: one serves all tests


@dataclass(frozen=True)
class Driver:
    """What a driver needs here. missing: why it cannot be tested; name: in the file, if it is not its key; model: the base;
    options: its own; sizes: of the base; loads: whether it takes further adapters while it runs."""

    missing: str | None = None
    name: str | None = None
    model: str = "./base"
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    loads: bool = True


VLLM = os.environ.get("MODEL_COMPOSE_VLLM_PYTHON")
LLAMA_SERVER = os.environ.get("MODEL_COMPOSE_LLAMA_SERVER")
KNOWN = {
    "huggingface": Driver(),
    "vllm": Driver(
        None if VLLM else "MODEL_COMPOSE_VLLM_PYTHON names no Python with vLLM (make test-vllm)",
        options={"python": VLLM, "kv_cache": "256MiB"},
        sizes={"head_dim": 32},  # the smallest that vLLM has kernels for
    ),
    "llamacpp": Driver(
        None if importlib.util.find_spec("llama_cpp") else "llama-cpp-python is not installed (make test-llamacpp)",
        model="./base.gguf",
    ),
    "llama-server": Driver(
        None if LLAMA_SERVER else "MODEL_COMPOSE_LLAMA_SERVER names no llama-server (make test-llama-server)",
        name="llamacpp",
        model="./base.gguf",
        options={"server": LLAMA_SERVER},
        loads=False,
    ),
}
DRIVERS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(driver.missing), reason=driver.missing or ""))
    for name, driver in KNOWN.items()
]
GREEDY = Sampling(max_output_length=16, min_output_length=16, do_sample=False)
SVD = Svd(rank=8)
BLENDS = [Blend(), Blend({"alpaca": 1.0}), Blend({"pirate": 1.5}), Blend({"alpaca": 0.7, "pirate": -0.8})]


def make(driver: str, folder: Path, **changes: Any) -> Engine:
    adapters = [{"type": "lora", "name": name, "model": f"./{name}"} for name in ("alpaca", "pirate")]
    settings: dict[str, Any] = {"type": "model", "task": "text-generation", "precision": "float32"}
    settings |= {"model": KNOWN[driver].model, **changes}
    settings["options"] = KNOWN[driver].options | settings.get("options", {})
    if settings["model"] == "./base.gguf" and not (folder / "base.gguf").exists():
        gguf_base.save_gguf(folder / "base", folder / "base.gguf")
    name = KNOWN[driver].name or driver
    options = TextGenerationOptions.model_validate({"driver": name, "peft_adapters": adapters, **settings})
    return ENGINES[name](options, options.to_blends(), folder)


@dataclass(frozen=True)
class Opened:
    """An engine, what it reported while it opened, and the folder of its project."""

    driver: Driver
    engine: Engine
    reports: list[Progress]
    folder: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=DRIVERS)
async def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Opened]:
    driver: str = request.param
    config = tiny.llama_config(**KNOWN[driver].sizes)
    folder = tiny.save_project(tmp_path_factory.mktemp(driver), config=config).parent
    reports: list[Progress] = []
    compressed = {**SVD.model_dump(), "weights": BLENDS[3].weights}
    engine = make(driver, folder, blends={"compressed": compressed})
    await engine.open(reports.append)
    yield Opened(KNOWN[driver], engine, reports, folder)
    await engine.close()


@pytest.fixture
def engine(opened: Opened) -> Engine:
    return opened.engine


async def text(engine: Engine, prompt: str, blend: Blend = BLENDS[0], sampling: Sampling = GREEDY) -> str:
    async with aclosing(engine.generate(Request(prompt, blend, sampling))) as chunks:
        return (await collect(chunks)).texts[0].text


async def test_blends_differ_and_the_order_of_use_does_not_matter(engine: Engine) -> None:
    first = [await text(engine, "Hello", blend) for blend in BLENDS]
    assert len(set(first)) == len(BLENDS)
    assert [await text(engine, "Hello", blend) for blend in reversed(BLENDS)] == first[::-1]


async def test_requests_at_once_keep_their_own_blend(engine: Engine) -> None:
    alone = [await text(engine, f"Prompt {n}", blend) for n in range(2) for blend in BLENDS]
    together = await asyncio.gather(*(text(engine, f"Prompt {n}", blend) for n in range(2) for blend in BLENDS))
    assert together == alone


async def test_one_seed_is_one_text(engine: Engine) -> None:
    def drawn(seed: int | None) -> Sampling:
        return Sampling(max_output_length=16, min_output_length=16, temperature=1.5, top_p=1.0, top_k=0, seed=seed)

    one, same, other = [await text(engine, "Hello", sampling=drawn(seed)) for seed in (7, 7, 8)]
    assert one == same != other
    assert await text(engine, "Hello", sampling=drawn(None)) != await text(engine, "Hello", sampling=drawn(None))


async def test_several_sequences_of_one_prompt(engine: Engine) -> None:
    sampling = Sampling(max_output_length=8, min_output_length=8, seed=3, num_return_sequences=3, temperature=2.0)
    completion = await collect(engine.generate(Request("Hello", BLENDS[1], sampling)))
    assert len({text.text for text in completion.texts}) == 3
    assert completion.usage.completion_tokens == 24


async def test_stop_strings_are_cut_and_end_the_text(engine: Engine) -> None:
    whole = await text(engine, "Hello", BLENDS[1])
    stop = whole[4:7]  # spans tokens: one token is one byte
    sampling = Sampling(max_output_length=16, do_sample=False, stop_sequences=("never", stop))
    completion = await collect(engine.generate(Request("Hello", BLENDS[1], sampling)))
    assert completion.texts[0].text == whole[: whole.index(stop)]
    assert completion.texts[0].finish == "stop"


async def test_lengths(engine: Engine) -> None:
    completion = await collect(engine.generate(Request("Hello", BLENDS[0], GREEDY)))
    assert completion.usage.completion_tokens == 16
    assert completion.texts[0].finish == "length"
    unlimited = Sampling(min_output_length=10_000, do_sample=False)
    completion = await collect(engine.generate(Request("x" * 240, BLENDS[0], unlimited)))
    assert completion.usage.prompt_tokens + completion.usage.completion_tokens == 256  # the context's end


async def test_a_prompt_that_does_not_fit_names_both_lengths(engine: Engine) -> None:
    with pytest.raises(InputError, match="the prompt has 300 tokens, and this model's context holds 256"):
        await text(engine, "x" * 300)
    truncated = Request("x" * 300, BLENDS[0], GREEDY, max_input_length=20)
    assert (await collect(engine.generate(truncated))).usage.prompt_tokens == 20


async def test_usage_comes_with_the_last_chunk_alone(engine: Engine) -> None:
    chunks = [chunk async for chunk in engine.generate(Request("Hello", BLENDS[0], GREEDY))]
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len(chunks) > 2


def characters(text: bytes) -> int:
    """How many are complete; each byte that can be no part of one counts as one."""
    return len(codecs.getincrementaldecoder("utf-8")("replace").decode(text))


async def test_logprobs_describe_the_drawn_tokens(engine: Engine) -> None:
    sampling = Sampling(max_output_length=5, min_output_length=5, do_sample=False, logprobs=3)
    completion = await collect(engine.generate(Request("Hello", BLENDS[0], sampling)))
    tokens = completion.texts[0].logprobs
    assert len(tokens) == 5
    for token in tokens:
        assert len(token.top) == 3
        assert token.logprob <= token.top[0][1] <= 0
    assert tokens[0].token == tokens[0].top[0][0]  # greedy draws the likeliest
    said = [token.token for token in tokens]
    assert b"".join(said).decode(errors="replace").removesuffix("\ufffd") == completion.texts[0].text.removesuffix(
        "\ufffd"
    )
    before = [b"".join(said[:count]) for count in range(len(said))]
    assert [token.position for token in tokens] == [characters(text) for text in before]


async def test_chat_goes_through_the_template(engine: Engine) -> None:
    messages = (Message("system", "Be brief"), Message("user", "Hi"))
    raw = "<system>Be brief</s><user>Hi</s><assistant>"
    chat = await collect(engine.generate(Request(messages, BLENDS[1], GREEDY)))
    assert chat.texts[0].text == await text(engine, raw, BLENDS[1])
    with pytest.raises(InputError, match="chat template refuses these messages: unknown role"):
        await collect(engine.generate(Request((Message("wizard", "Hi"),), BLENDS[1], GREEDY)))


async def test_closing_the_stream_stops_the_computation(engine: Engine) -> None:
    endless = Request("Hello", BLENDS[1], Sampling(min_output_length=10_000))
    async with aclosing(engine.generate(endless)) as chunks:
        await anext(chunks)
    before = await text(engine, "Hello")
    assert before == await text(engine, "Hello")


async def test_loading_reports_progress(opened: Opened) -> None:
    assert any(report.total and report.done == report.total for report in opened.reports)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_text_comes_in_whole_characters(driver: str, tmp_path: Path) -> None:
    """A model that can only say 'é', one byte a token: never half of it, in no chunk."""
    folder = tiny.save_project(tmp_path, config=tiny.llama_config(**KNOWN[driver].sizes)).parent
    tiny.teach_to_say(folder / "base", "é€👍")
    engine = make(driver, folder)
    await engine.open(silent)
    chunks: list[Chunk] = [c async for c in engine.generate(Request("é€👍", Blend(), Sampling(27, do_sample=False)))]
    await engine.close()
    assert [chunk.text for chunk in chunks if chunk.text] == ["é", "€", "👍"] * 3


async def test_svd_that_drops_nothing_is_the_sum(engine: Engine) -> None:
    assert await text(engine, "Hello", replace(BLENDS[3], method=SVD)) == await text(engine, "Hello", BLENDS[3])


async def test_an_adapter_that_is_gone_is_the_request_s_fault(opened: Opened) -> None:
    engine = opened.engine
    options = AdapterOptions.model_validate({"type": "lora", "name": "third", "model": "./pirate"})
    if not opened.driver.loads:
        with pytest.raises(Conflict, match="loads adapters only when it starts"):
            await engine.load_adapter(options, silent)
        return
    await engine.load_adapter(options, silent)
    blend = Blend({"third": 1.5})
    assert await text(engine, "Hello", blend) == await text(engine, "Hello", BLENDS[2])
    await engine.unload_adapter("third")
    with pytest.raises(InputError, match="the adapter 'third' has been unloaded meanwhile"):
        await text(engine, "Hello", blend)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_close_ends_what_runs(driver: str, tmp_path: Path) -> None:
    folder = tiny.save_project(tmp_path, config=tiny.llama_config(**KNOWN[driver].sizes)).parent
    engine = make(driver, folder)
    await engine.open(silent)
    chunks = engine.generate(Request("Hello", BLENDS[1], Sampling(min_output_length=10_000)))
    await anext(chunks)
    await engine.close()
    with pytest.raises(Exception, match="shutting down"):
        async for _ in chunks:
            pass
