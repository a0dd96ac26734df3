"""llama.cpp: the same answers as the embedded engine on the same GGUF base, blends in turns, and what it refuses."""

import asyncio
import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from pydantic import ValidationError
from transformers import AutoConfig

from model_compose.engines import Engine
from model_compose.engines.llamacpp.embedded import EmbeddedEngine
from model_compose.engines.options import AdapterOptions
from model_compose.errors import AdapterError, InputError, LoadError, Overloaded, RunError
from model_compose.generation import Completion, Request, ResponseFormat, Sampling, collect
from model_compose.lora.blend import Blend
from model_compose.progress import silent
from tests import gguf_base, tiny
from tests.contracts.test_engine import BLENDS, GREEDY, make, text

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: make test-llamacpp"
)
ENDLESS = Sampling(min_output_length=10_000, do_sample=False)
PROMPTS = ("Hello", "The quick brown fox", "0123456789 " * 12)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


async def opened(folder: Path, driver: str = "llamacpp", **changes: Any) -> Any:
    engine = make(driver, folder, **{"model": "./base.gguf", **changes})
    await engine.open(silent)
    return engine


@pytest.fixture
async def engine(project: Path) -> AsyncIterator[EmbeddedEngine]:
    made = await opened(project.parent, options={"kv_cache": "1MB"})
    yield made
    await made.close()


async def answer(engine: Engine, prompt: str, blend: Blend, sampling: Sampling = GREEDY) -> Completion:
    return await collect(engine.generate(Request(prompt, blend, sampling)))


async def logprobs(engine: Engine, prompt: str, blend: Blend) -> dict[str, float]:
    """Of the token after the prompt, by its text; half characters, which share one text, are left out."""
    sampling = Sampling(1, do_sample=False, logprobs=gguf_base.VOCABULARY)
    (token,) = (await answer(engine, prompt, blend, sampling)).texts[0].logprobs
    return {text.decode(): value for text, value in token.top if text.isascii()}


async def distance(one: Engine, other: Engine, blend: Blend) -> float:
    """The largest difference of log-probabilities, over some prompts."""
    largest = 0.0
    for prompt in PROMPTS:
        left, right = await logprobs(one, prompt, blend), await logprobs(other, prompt, blend)
        assert len(left) > 100
        assert left.keys() == right.keys()
        largest = max(largest, *(abs(left[token] - right[token]) for token in left))
    return largest


def save_wide(folder: Path, head: list[str], std: float = 0.05) -> None:
    """Adapters on every kind of module, and a base whose sizes fit blocks of 32. head: its modules to adapt as well."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": gguf_base.VOCABULARY}
    base = tiny.save_base(folder / "base", tiny.llama_config(**sizes))
    tiny.save_adapter(folder / "alpaca", base, seed=1, std=std, target_modules=ALL + head)
    tiny.save_adapter(folder / "pirate", base, seed=2, std=std, r=2, use_rslora=True, target_modules=ALL[:4])


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
async def test_log_probabilities_are_the_embedded_engines_within_the_noise_of_the_bare_base(
    tmp_path: Path, kind: str
) -> None:
    # The embedded engine compares a head that comes along with the base's own, which a quantised one is not.
    save_wide(tmp_path, ["lm_head", "embed_tokens"] if kind == "F32" else [], 0.05 if kind == "F32" else 0.3)
    gguf_base.save_gguf(tmp_path / "base", tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType[kind])
    ours, reference = await opened(tmp_path), await opened(tmp_path, "huggingface")
    noise = await distance(ours, reference, Blend())
    assert noise < (1e-5 if kind == "F32" else 0.2)  # quantised, llama.cpp rounds activations too
    for blend in ({"alpaca": 1.0}, {"pirate": 1.5}, {"alpaca": 0.7, "pirate": -0.8}):
        assert await distance(ours, reference, Blend(blend)) <= 3 * noise
        plain, blended = await logprobs(ours, "Hello", Blend()), await logprobs(ours, "Hello", Blend(blend))
        assert max(abs(plain[token] - blended[token]) for token in plain) > 10 * noise
    await ours.close()
    await reference.close()


@needs_llama_cpp
async def test_greedy_and_drawn_text_are_the_embedded_engines(engine: Engine, project: Path) -> None:
    reference = await opened(project.parent, "huggingface")
    drawn = Sampling(16, 16, temperature=1.3, top_k=20, seed=5, repetition_penalty=1.2, logprobs=0)
    for blend in BLENDS:
        for prompt in PROMPTS:
            assert await text(engine, prompt, blend) == await text(reference, prompt, blend)
            assert await text(engine, prompt, blend, drawn) == await text(reference, prompt, blend, drawn)
    await reference.close()


@needs_llama_cpp
async def test_token_ids_are_those_of_llama_cpps_own_vocabulary(engine: EmbeddedEngine) -> None:
    import llama_cpp

    assert engine._loaded is not None
    assert engine._running is not None
    vocabulary = llama_cpp.llama_model_get_vocab(engine._loaded.llama._model)
    for prompt in (*PROMPTS, "é€👍", "a\n\n b\t c", "</s>x"):
        raw = prompt.encode()
        found = (ctypes.c_int32 * 256)()
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), found, 256, True, True)
        assert engine._running.prompts.tokenizer(prompt)["input_ids"] == list(found[:count])


async def check_split(driver: str, project: Path, folder: Path) -> None:
    """A base in several files is the same base, and its first file is the one to name."""
    for name in ("alpaca", "pirate"):
        (folder / name).symlink_to(project.parent / name)
    gguf_base.save_gguf(project.parent / "base", folder / "base.gguf")
    gguf_base.save_gguf(project.parent / "base", folder / "parts.gguf", split=8)
    one = await opened(folder, driver)
    parts = await opened(folder, driver, model="./parts-00001-of-00003.gguf")
    for blend in BLENDS:
        assert await text(one, "Hello", blend) == await text(parts, "Hello", blend)
    await one.close()
    await parts.close()
    with pytest.raises(
        LoadError, match=r"is a later part of a base; point to its first part, parts-00001-of-00003.gguf"
    ):
        await opened(folder, driver, model="./parts-00002-of-00003.gguf")
    (folder / "parts-00003-of-00003.gguf").unlink()
    with pytest.raises(LoadError, match=r"the first of 3 parts, but there is no parts-00003-of-00003.gguf beside it"):
        await opened(folder, driver, model="./parts-00001-of-00003.gguf")


@needs_llama_cpp
async def test_a_split_base_is_the_whole(project: Path, tmp_path: Path) -> None:
    await check_split("llamacpp", project, tmp_path)


async def test_the_embedded_engine_refuses_a_split_base(project: Path) -> None:
    """transformers would load the first file, and draw the weights of all others at random."""
    gguf_base.save_gguf(project.parent / "base", project.parent / "parts.gguf", split=8)
    with pytest.raises(LoadError, match=r"is one of several parts.*llama-gguf-split --merge"):
        await opened(project.parent, "huggingface", model="./parts-00001-of-00003.gguf")


@needs_llama_cpp
async def test_a_prefix_serves_its_own_blend_alone(engine: Engine) -> None:
    """Changing a weight changes the answer, and the first blend then gives its first answer again."""
    prompt = "The same beginning of many tokens. " * 4
    one, other = Blend({"alpaca": 1.0, "pirate": 0.5}), Blend({"alpaca": 1.0, "pirate": 0.6})
    first, changed, again = [await answer(engine, prompt, blend) for blend in (one, other, one)]
    assert first.texts == again.texts != changed.texts
    assert (first.usage.cached_tokens, changed.usage.cached_tokens) == (0, 0)
    assert again.usage.cached_tokens == len(prompt) - 1
    longer = await answer(engine, prompt + "And more.", one)
    assert longer.usage.cached_tokens >= len(prompt)
    fresh = Blend({"alpaca": 1.0, "pirate": 0.5, "unused": 0.0})  # the same blend: a weight of 0 counts for nothing
    assert (await answer(engine, prompt, fresh)).texts == first.texts


@needs_llama_cpp
async def test_the_last_row_left_goes_on_in_place(project: Path) -> None:
    engine = await opened(project.parent, options={"max_batch_size": 1})
    prompt = "The same beginning of many tokens. " * 2
    alone = await answer(engine, prompt, BLENDS[1])
    again = await answer(engine, prompt, BLENDS[1])
    assert again.texts == alone.texts
    assert again.usage.cached_tokens == len(prompt) - 1
    assert (await answer(engine, prompt, BLENDS[2])).usage.cached_tokens == 0
    await engine.close()


@needs_llama_cpp
async def test_n_texts_read_their_prompt_once(engine: EmbeddedEngine) -> None:
    prompt = "x" * 100
    sampling = Sampling(8, 8, seed=3, num_return_sequences=3, temperature=2.0)
    completion = await answer(engine, prompt, BLENDS[1], sampling)
    stats = engine.stats()
    assert stats is not None
    assert stats.prefix_hits == 2 * 99
    singles = [(await answer(engine, prompt, BLENDS[1], replace(sampling, num_return_sequences=1, seed=3 + n)))
               for n in range(3)]  # fmt: skip
    assert [single.texts[0].text for single in singles] == [each.text for each in completion.texts]


@needs_llama_cpp
async def test_blends_take_turns(engine: Engine) -> None:
    """Neither of two endless texts waits for the other's end."""
    streams = [engine.generate(Request("Hello", blend, ENDLESS)) for blend in BLENDS]
    for _ in range(5):
        for stream in streams:
            await anext(stream)
    for stream in streams:
        await stream.aclose()


@needs_llama_cpp
async def test_more_texts_than_rows_and_cells(project: Path) -> None:
    """Texts wait for a row, and give their cells up for older ones; none of them changes."""
    wide = await opened(project.parent)
    cell = 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, size, float32
    narrow = await opened(project.parent, options={"max_batch_size": 3, "kv_cache": f"{cell * 256}B", "n_batch": 16})
    requests = [(f"{'y' * (20 * n)} {n}", BLENDS[n % 3], Sampling(90, 90, do_sample=False)) for n in range(7)]
    expected = [await text(wide, *request) for request in requests]
    assert await asyncio.gather(*(text(narrow, *request) for request in requests)) == expected
    stats = narrow.stats()
    assert stats.preemptions > 0
    assert (stats.running, stats.waiting, stats.kv_cache_total) == (0, 0, cell * 256)
    await wide.close()
    await narrow.close()


@needs_llama_cpp
async def test_a_failing_request_harms_no_other(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = await text(engine, "Hello")
    assert engine._loaded is not None
    llama, poison = engine._loaded.llama, tiny.tokenizer()("☠")["input_ids"][0]
    decode = llama._lib.llama_decode

    def fail(context: Any, batch: Any) -> int:
        tokens = batch.token[: batch.n_tokens]
        code: int = decode(context, batch)  # what it has computed by then has to be undone
        return -3 if poison in tokens else code

    monkeypatch.setattr(llama._lib, "llama_decode", fail)
    good, bad = await asyncio.gather(text(engine, "Hello"), text(engine, "☠"), return_exceptions=True)
    assert good == expected
    assert isinstance(bad, RunError)
    assert "llama_decode returned -3" in caplog.text
    assert await text(engine, "Hello") == expected


@needs_llama_cpp
async def test_what_is_too_much_is_answered_429(project: Path) -> None:
    engine = await opened(project.parent, options={"max_batch_size": 1, "max_queue": 0})
    async with aclosing(engine.generate(Request("Hello", Blend(), ENDLESS))) as chunks:
        await anext(chunks)
        with pytest.raises(Overloaded, match=r"max_batch_size 1, max_queue 0"):
            await text(engine, "Hello")
    await engine.close()


@needs_llama_cpp
async def test_adapters_come_and_go_while_requests_run(engine: EmbeddedEngine, project: Path) -> None:
    blend = Blend({"alpaca": 1.0})
    before, identity = await text(engine, "Hello", blend), engine.identity(blend)
    chunks = engine.generate(Request("Hello", blend, ENDLESS))
    await anext(chunks)
    other = AdapterOptions.model_validate({"type": "lora", "name": "alpaca", "model": "./pirate"})
    await engine.load_adapter(other, silent)
    assert engine._loaded is not None
    assert set(engine._loaded.llama.adapters) == {"alpaca", "alpaca'", "pirate"}
    assert engine.identity(blend) != identity
    assert await text(engine, "Hello", blend) == await text(engine, "Hello", Blend({"pirate": 1.0})) != before
    await chunks.aclose()
    assert await text(engine, "Hello", Blend()) == await text(engine, "Hello", Blend())
    assert set(engine._loaded.llama.adapters) == {"alpaca'", "pirate"}
    await engine.unload_adapter("alpaca")
    assert set(engine._loaded.llama.adapters) == {"pirate"}


@needs_llama_cpp
async def test_response_formats_are_kept_to(engine: Engine) -> None:
    for format, pattern in ((ResponseFormat("json_object"), "{"), (ResponseFormat("regex", "[ab]{3}"), "")):
        completion = await answer(engine, "Hello", BLENDS[1], Sampling(40, response_format=format, seed=1))
        assert completion.texts[0].text.startswith(pattern)
    assert set(completion.texts[0].text) <= set("ab")
    assert len(completion.texts[0].text) == 3
    with pytest.raises(InputError, match="names the token 999, but this model has the tokens 0 to 258"):
        await text(engine, "Hello", sampling=replace(GREEDY, logit_bias=((999, 1.0),)))


@needs_llama_cpp
async def test_what_does_not_fit_is_refused_before_the_base_is_loaded(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny.save_base(tmp_path / "other", tiny.llama_config(hidden_size=64))
    tiny.save_adapter(tmp_path / "alpaca", other)
    gguf_base.save_gguf(project.parent / "base", tmp_path / "base.gguf")
    (tmp_path / "pirate").symlink_to(project.parent / "pirate")
    monkeypatch.setattr("model_compose.engines.llamacpp.llama.Llama", None)  # would fail otherwise
    with pytest.raises(AdapterError, match=r"adapter 'alpaca': .*q_proj.*64 inputs and 64 outputs.*32 inputs and 32"):
        await opened(tmp_path)


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
async def test_an_embedding_that_comes_along_must_be_the_bases_own(tmp_path: Path, kind: str) -> None:
    save_wide(tmp_path, ["lm_head"])
    gguf_base.save_gguf(tmp_path / "base", tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType[kind])
    await (await opened(tmp_path)).close()
    other = tiny.save_base(tmp_path / "other", AutoConfig.from_pretrained(tmp_path / "base"), seed=5)
    gguf_base.save_gguf(other, tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType[kind])
    with pytest.raises(AdapterError, match=r"adapter 'alpaca': it brings its own 'lm_head.weight', which differs"):
        await opened(tmp_path)


@needs_llama_cpp
async def test_what_is_no_gguf_file_or_too_small_a_cache_is_one_sentence(project: Path, tmp_path: Path) -> None:
    for name in ("alpaca", "pirate"):
        (tmp_path / name).symlink_to(project.parent / name)
    whole = (project.parent / "base.gguf").read_bytes()
    for content in (b"nonsense", whole[:200]):
        (tmp_path / "base.gguf").write_bytes(content)
        with pytest.raises(LoadError, match=r"base.gguf cannot be read as a GGUF file.*download it again"):
            await opened(tmp_path)
    with pytest.raises(LoadError, match=r"one text needs 200; set a larger kv_cache, or a smaller max_context"):
        await opened(project.parent, options={"kv_cache": "2kB", "max_context": 200})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model": {"path": "./base", "filename": "model.safetensors"}},
            r"'model': it needs a GGUF file, and ./base/model.safetensors is not one; name one with 'filename'",
        ),
        ({"model": "org/base"}, r"'model': it needs a GGUF file, and org/base is not one; name one with 'filename'"),
        ({"precision": "bfloat16"}, "'precision': .*float16 or float32"),
        ({"quantization": "int8"}, "'quantization': .*use a file with another quantisation"),
        ({"device": "cuda:1"}, "'device': .*set auto or cpu"),
        ({"fast_tokenizer": False}, "'fast_tokenizer'"),
        ({"device": "cpu", "options": {"n_gpu_layers": 3}}, "'n_gpu_layers': device is cpu"),
        ({"options": {"n_batch": 4}}, r"'n_batch': it is smaller than max_batch_size \(8\)"),
        ({"options": {"fold": "always"}}, "unknown key 'fold'"),
    ],
    ids=str,
)
def test_what_it_cannot_honour_is_refused_by_name(changes: dict[str, Any], said: str, project: Path) -> None:
    with pytest.raises(ValidationError, match=said):
        make("llamacpp", project.parent, **changes)
    adapter = {"type": "lora", "name": "alpaca", "model": "./alpaca", "precision": "float16"}
    with pytest.raises(ValidationError, match="adapters compute in float32"):
        make("llamacpp", project.parent, peft_adapters=[adapter])


async def test_without_llama_cpp_the_remedy_is_a_command(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(
        LoadError, match="needs llama-cpp-python, which is not installed; pip install 'llama-cpp-python>="
    ):
        await opened(project.parent)


def test_validating_imports_neither_llama_cpp_nor_torch(project: Path) -> None:
    path = project.parent / "llamacpp.yml"
    path.write_text(tiny.YAML.replace("model: ./base", "driver: llamacpp\n  model: ./base.gguf"))
    script = f"""
import sys
from pathlib import Path
from model_compose.loading import load
load([Path({str(path)!r})])
print(sorted(sys.modules.keys() & {{"llama_cpp", "torch", "gguf", "numpy"}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done
