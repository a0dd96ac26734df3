"""The embedded engine: the same text as transformers' generate, its own options, and what goes wrong while loading."""

import asyncio
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)  # fmt: skip

from model_compose.engines.devices import pick_device, pick_dtype
from model_compose.engines.huggingface.engine import HuggingfaceEngine
from model_compose.engines.text import Detokenizer, StopStrings
from model_compose.errors import AdapterError, InputError, LoadError, RunError
from model_compose.generation import Request, Sampling, collect
from model_compose.lora.blend import Blend
from model_compose.progress import silent
from tests import tiny
from tests.contracts.test_engine import GREEDY, make, text

ROOT = Path(__file__).parents[2]


async def opened(folder: Path, **changes: Any) -> HuggingfaceEngine:
    engine = make("huggingface", folder, **changes)
    assert isinstance(engine, HuggingfaceEngine)
    await engine.open(silent)
    return engine


@pytest.mark.parametrize("penalty", [1.0, 1.7])
async def test_greedy_text_is_what_transformers_generates(project: Path, penalty: float) -> None:
    engine = await opened(project.parent)
    model = AutoModelForCausalLM.from_pretrained(project.parent / "base").eval()
    tokenizer = tiny.tokenizer()
    ids = tokenizer("Hello world", return_tensors="pt")["input_ids"]
    reference = model.generate(
        ids, do_sample=False, max_new_tokens=20, min_new_tokens=20, repetition_penalty=penalty, pad_token_id=tiny.EOS
    )
    sampling = Sampling(20, 20, do_sample=False, repetition_penalty=penalty)
    assert await text(engine, "Hello world", Blend(), sampling) == tokenizer.decode(reference[0, ids.shape[1] :])
    await engine.close()


async def test_a_prompt_longer_than_a_prefill_step(tmp_path: Path) -> None:
    """Chunked prefill gives the text that one pass gives."""
    base = tiny.save_base(tmp_path / "base", tiny.llama_config(max_position_embeddings=2048))
    for name in ("alpaca", "pirate"):
        tiny.save_adapter(tmp_path / name, base)
    engine = await opened(tmp_path)
    prompt = "The quick brown fox. " * 60
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = tiny.tokenizer()(prompt, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 1024
    reference = model.generate(ids, do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=tiny.EOS)
    ours = await text(engine, prompt, Blend(), Sampling(8, 8, do_sample=False))
    assert ours == tiny.tokenizer().decode(reference[0, ids.shape[1] :])
    await engine.close()


SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 128, "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, PreTrainedConfig] = {
    "mistral, sliding window": MistralConfig(**SIZES, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "gemma2, both kinds of layer": Gemma2Config(**SIZES, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3, both kinds of layer": Gemma3TextConfig(**SIZES, sliding_window=8, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(
        vocab_size=tiny.VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=tiny.BOS,
        eos_token_id=tiny.EOS, initializer_range=0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_family_in_a_batch_of_unequal_prompts_is_what_transformers_generates(
    tmp_path: Path, family: str
) -> None:
    base = tiny.save_base(tmp_path / "base", FAMILIES[family])
    targets = ["c_attn"] if family == "gpt2" else ["q_proj"]
    for name in ("alpaca", "pirate"):
        tiny.save_adapter(tmp_path / name, base, target_modules=targets, std=0.5)
    engine = await opened(tmp_path)
    prompts = ["The quick brown fox jumps", "Hi", "Lorem ipsum dolor sit amet, consectetur"]
    texts = await asyncio.gather(
        *(text(engine, prompt, Blend(), Sampling(12, 12, do_sample=False)) for prompt in prompts),
        *(text(engine, prompt, Blend({"alpaca": 2.0})) for prompt in prompts),
    )
    await engine.close()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), tiny.tokenizer()
    for prompt, ours in zip(prompts, texts[:3], strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        reference = model.generate(ids, do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=tiny.EOS)[
            0, ids.shape[1] :
        ]
        assert ours == detokenized(ids[0].tolist(), reference.tolist())
    assert set(texts[:3]).isdisjoint(texts[3:])


def detokenized(prompt: list[int], tokens: list[int]) -> str:
    """Text as a stream gives it: a last, incomplete character is left out."""
    detokenizer = Detokenizer(tiny.tokenizer(), prompt)
    return "".join(detokenizer.push(token) for token in tokens)


async def test_more_requests_than_rows_wait_their_turn(project: Path) -> None:
    narrow, wide = await opened(project.parent, options={"max_batch_size": 2}), await opened(project.parent)
    blends = [Blend({"alpaca": weight / 2}) for weight in range(7)]
    expected = await asyncio.gather(*(text(wide, "Hello", blend) for blend in blends))
    assert await asyncio.gather(*(text(narrow, "Hello", blend) for blend in blends)) == expected
    await narrow.close()
    await wide.close()


async def test_fold_always_equals_live_and_takes_no_other_blend(project: Path) -> None:
    live, folded = await opened(project.parent), await opened(project.parent, options={"fold": "always"})
    default = Blend({"alpaca": 1.0, "pirate": 1.0})
    assert await text(folded, "Hello", default) == await text(live, "Hello", default)
    with pytest.raises(InputError, match=r"fold: always.*takes no other"):
        await text(folded, "Hello", Blend({"alpaca": 0.5}))
    await live.close()
    await folded.close()


async def test_a_failing_request_harms_no_other(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = await opened(project.parent)
    expected = await text(engine, "Hello")
    assert engine._loaded is not None
    poison = tiny.tokenizer()("☠")["input_ids"][0]

    def fail(_: Any, inputs: tuple[Any, ...]) -> None:
        if poison in inputs[0]:
            raise ZeroDivisionError("a kernel that fails on this input")

    engine._loaded.model.get_submodule("model.embed_tokens").register_forward_pre_hook(fail)
    good, bad = await asyncio.gather(text(engine, "Hello"), text(engine, "☠"), return_exceptions=True)
    assert good == expected
    assert isinstance(bad, RunError)
    assert "the model failed while generating (ZeroDivisionError); the log has the details" in str(bad)
    assert "a kernel that fails" in caplog.text
    assert await text(engine, "Hello") == expected
    await engine.close()


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


async def test_another_base_is_a_warning_that_names_both(
    project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(project.parent, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "base/config.json", _name_or_path="meta-llama/Llama-2-7b-hf")
    edit(tmp_path / "alpaca/adapter_config.json", base_model_name_or_path="decapoda-research/llama-7b-hf")
    with caplog.at_level(logging.WARNING):
        await (await opened(tmp_path)).close()
    (warning,) = [record.getMessage() for record in caplog.records if "was trained on" in record.getMessage()]
    assert warning == (
        "adapter 'alpaca' was trained on decapoda-research/llama-7b-hf, but the base model is meta-llama/Llama-2-7b-hf; "
        "the shapes fit, but the text may be worse"
    )


async def test_shapes_are_checked_before_names(project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An adapter that does not fit is told so, and nothing about shapes that fit."""
    shutil.copytree(project.parent, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "base/config.json", _name_or_path="meta-llama/Llama-2-7b-hf")
    shutil.rmtree(tmp_path / "alpaca")
    tiny.save_adapter(tmp_path / "alpaca", tiny.save_base(tmp_path / "other", tiny.llama_config(hidden_size=64)))
    edit(tmp_path / "alpaca/adapter_config.json", base_model_name_or_path="decapoda-research/llama-7b-hf")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(AdapterError, match=r"The adapter belongs to another base model"),
    ):
        await opened(tmp_path)
    assert "the shapes fit" not in caplog.text


async def test_an_adapter_of_another_shape_is_refused_with_both_shapes(project: Path, tmp_path: Path) -> None:
    other = tiny.save_base(tmp_path / "other", tiny.llama_config(hidden_size=64))
    tiny.save_adapter(tmp_path / "alpaca", other)
    (tmp_path / "base").symlink_to(project.parent / "base")
    (tmp_path / "pirate").symlink_to(project.parent / "pirate")
    with pytest.raises(AdapterError, match=r"adapter 'alpaca': .*q_proj.*64 inputs and 64 outputs.*32 inputs and 32"):
        await opened(tmp_path)


async def test_devices_and_precisions(project: Path) -> None:
    with pytest.raises(LoadError, match=r"device 'cuda:7' does not exist on this machine.*use 'auto' or 'cpu'"):
        await opened(project.parent, device="cuda:7")
    with pytest.raises(LoadError, match="device 'gpu' is not known"):
        pick_device("gpu")
    cpu = torch.device("cpu")
    assert pick_dtype("float16", cpu) == torch.float16
    assert pick_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    assert pick_dtype("auto", torch.device("cuda")) == "auto"
    engine = await opened(project.parent, precision="bfloat16")
    assert await text(engine, "Hello", Blend({"alpaca": 1.0}))
    await engine.close()


@pytest.mark.parametrize(
    "changes",
    [{"on_demand": True}, {"fast_tokenizer": False}, {"runtime_spec": {"vram": 1}}],
    ids=str,
)
def test_options_that_it_cannot_honour_are_refused_by_name(project: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"driver huggingface cannot honour '{next(iter(changes))}'"):
        make("huggingface", project.parent, **changes)


async def test_quantizations_that_do_not_work_are_refused_by_name(project: Path) -> None:
    with pytest.raises(ValidationError, match="'int8', 'int4', 'nf4' or 'fp4'"):
        make("huggingface", project.parent, quantization="int2")
    with pytest.raises(ValidationError, match="a quantised base is never folded; leave fold out"):
        make("huggingface", project.parent, quantization="int8", options={"fold": "always"})
    with pytest.raises(LoadError, match="quantization: nf4 is not available on cpu; on cpu use int8 or int4"):
        await opened(project.parent, quantization={"type": "nf4"}, device="cpu")


async def test_logit_bias_and_penalties(project: Path) -> None:
    engine = await opened(project.parent)
    plain = await text(engine, "Hello")
    favourite = tiny.tokenizer()("q")["input_ids"][0]
    assert await text(engine, "Hello", sampling=replace(GREEDY, logit_bias=((favourite, 100.0),))) == "q" * 16
    varied = await text(engine, "Hello", sampling=replace(GREEDY, frequency_penalty=2.0, presence_penalty=2.0))
    assert varied != plain
    with pytest.raises(InputError, match="names the token 999, but this model has the tokens 0 to 257"):
        await text(engine, "Hello", sampling=replace(GREEDY, logit_bias=((999, 1.0),)))
    await engine.close()


def test_unknown_engine_options_name_the_nearest() -> None:
    with pytest.raises(ValidationError, match="unknown key 'folds'; did you mean 'fold'"):
        make("huggingface", Path(), options={"folds": "always"})


async def test_what_is_no_model_is_one_sentence(project: Path, tmp_path: Path) -> None:
    for name in ("alpaca", "pirate"):
        (tmp_path / name).symlink_to(project.parent / name)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(LoadError, match=r"\./base cannot be loaded as a causal language model: ") as caught:
        await opened(tmp_path)
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return os.getpid, ()


@pytest.mark.parametrize("content", [{"x": Evil()}, [1, 2], None], ids=["call", "list", "damaged"])
async def test_a_pickled_base_that_cannot_be_read_is_one_sentence(project: Path, tmp_path: Path, content: Any) -> None:
    """torch advises to set weights_only=False, which would execute it."""
    for name in ("alpaca", "pirate"):
        (tmp_path / name).symlink_to(project.parent / name)
    base = tiny.save_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    torch.save(content, base / "pytorch_model.bin")
    if content is None:
        (base / "pytorch_model.bin").write_bytes(b"garbage" * 99)
    with pytest.raises(LoadError, match=r"\./base cannot be loaded as a causal language model: .") as caught:
        await opened(tmp_path)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(content, list | None) or "it would call posix.getpid" in str(caught.value)


async def test_a_byte_order_mark_in_an_adapters_and_the_bases_config(project: Path, tmp_path: Path) -> None:
    for name in ("alpaca", "pirate"):
        shutil.copytree(project.parent / name, tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (tmp_path / "base").symlink_to(project.parent / "base")
    engine = await opened(tmp_path)
    assert await text(engine, "Hello", Blend({"alpaca": 1.0}))
    await engine.close()


def test_out_of_memory_at_load_says_what_to_do(tmp_path: Path) -> None:
    """In a process of its own whose memory is limited to what Python needs plus half of the weights."""
    base = tiny.save_base(tmp_path / "base", tiny.llama_config(hidden_size=1024, intermediate_size=8192))
    for name in ("alpaca", "pirate"):
        tiny.save_adapter(tmp_path / name, base)
    script = f"""
import asyncio, re, resource
from pathlib import Path
import torch, transformers, model_compose.engines.huggingface.loading
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from tests.contracts.test_engine import make
used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (120 << 20), used + (120 << 20)))
try:
    asyncio.run(make("huggingface", Path({str(tmp_path)!r})).open(lambda _: None))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "LoadError out of memory on cpu while loading ./base; use a smaller precision" in done.stdout, done


async def test_without_a_chat_template(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", chat=False)
    for name in ("alpaca", "pirate"):
        tiny.save_adapter(tmp_path / name, base)
    engine = await opened(tmp_path)
    with pytest.raises(InputError, match="no chat template; use /v1/completions"):
        await collect(engine.generate(Request((), Blend(), GREEDY)))
    await engine.close()


def test_stop_strings_hold_back_only_what_may_become_one() -> None:
    stops = StopStrings(["###", "\n\n"])
    assert [stops.push(piece) for piece in ("a#", "#b", "\n", "c##", "#d")] == [
        ("a", False), ("##b", False), ("", False), ("\nc", False), ("", True),
    ]  # fmt: skip
    held = StopStrings(["###"])
    assert held.push("end##") == ("end", False)
    assert held.flush() == "##"


def test_detokenizer_keeps_spaces_and_whole_characters() -> None:
    tokenizer = tiny.tokenizer()
    prompt, answer = "Hello", " wörld 👍"
    detokenizer = Detokenizer(tokenizer, tokenizer(prompt)["input_ids"])
    pieces = [detokenizer.push(token) for token in tokenizer(answer)["input_ids"]]
    assert "".join(pieces) == answer
    assert "👍" in pieces


async def test_requests_that_come_and_go_keep_their_text(project: Path) -> None:
    """Rows are joined, moved and left in every order, some in the middle of a prompt; no text changes."""
    engine = await opened(project.parent, options={"max_batch_size": 3})
    rng = random.Random(0)
    plans = [
        (f"{'x' * rng.randrange(1, 200)} {n}", Blend({"alpaca": rng.choice([0, 0.5, 2]), "pirate": rng.choice([0, 1])}))
        for n in range(12)
    ]

    async def one(prompt: str, blend: Blend, length: int) -> str:
        return await text(engine, prompt, blend, Sampling(length, length, do_sample=False))

    lengths = [rng.randrange(1, 30) for _ in plans]
    alone = [await one(*plan, length) for plan, length in zip(plans, lengths, strict=True)]

    async def late(index: int) -> str:
        await asyncio.sleep(0.01 * rng.random())
        return await one(*plans[index], lengths[index])

    async def leave_early(index: int) -> None:
        async with aclosing(engine.generate(Request(plans[index][0], plans[index][1], GREEDY))) as chunks:
            if index % 2:
                await anext(chunks)

    together = await asyncio.gather(
        *(late(index) for index in range(len(plans))), *(leave_early(index) for index in range(len(plans)))
    )
    assert together[: len(plans)] == alone
    await engine.close()


async def test_what_a_failed_request_leaves_behind_harms_no_later_one(project: Path) -> None:
    """Its row of the KV cache may hold NaN, and 0 times NaN is NaN, where a mask hides it as well."""
    engine = await opened(project.parent)
    expected = await text(engine, "ccc")
    endless = engine.generate(Request("A long one", Blend({"alpaca": 0.5}), Sampling(min_output_length=10_000)))
    async with aclosing(endless):
        await anext(endless)  # holds row 0, so that the cache is not cleared
        with pytest.raises(InputError, match="scores are not finite"):
            await text(engine, "b" * 60, Blend({"alpaca": 1e30, "pirate": 1e30}))
        assert await text(engine, "ccc") == expected
    await engine.close()


def test_a_prompt_that_ends_in_half_a_character_is_not_repeated() -> None:
    tokenizer = tiny.tokenizer()
    for prompt in (tokenizer("hello \ufffd")["input_ids"], tokenizer("hello é")["input_ids"][:-1]):
        detokenizer = Detokenizer(tokenizer, prompt)
        assert "".join(detokenizer.push(token) for token in tokenizer("ok then")["input_ids"]) == "ok then"


@pytest.mark.parametrize(
    ("trained_on", "known_as", "warned"),
    [
        ("org/base", "org/base", False),
        ("other/Base", "org/base", False),  # a re-upload
        ("org/base-instruct", "org/base", True),
        ("/home/me/base-instruct", "org/base", False),
        ("./model", "org/base", False),
        (None, "org/base", False),
        ("org/base-instruct", None, False),
        ("org/base-instruct", "/data/models/base", False),
    ],
)
async def test_only_names_on_the_hub_are_compared(
    project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, trained_on: str | None, known_as: str | None,
    warned: bool,
) -> None:  # fmt: skip
    """A folder's name is no evidence: where nothing is known of the base, nothing is said."""
    shutil.copytree(project.parent, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "base/config.json", _name_or_path=known_as)
    edit(tmp_path / "alpaca/adapter_config.json", base_model_name_or_path=trained_on)
    with caplog.at_level(logging.WARNING):
        await (await opened(tmp_path)).close()
    assert ("adapter 'alpaca' was trained on" in caplog.text) == warned
