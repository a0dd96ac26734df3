"""The scheduler: whatever the order and the memory, every sequence gets the text that it would get alone."""

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPTJConfig

from model_compose.engines.huggingface.attention import Pass, Piece
from model_compose.engines.huggingface.batch import Batch
from model_compose.engines.huggingface.cache import SMALLEST, KVCache, LayerShape
from model_compose.engines.huggingface.decoder import LlamaForward, native_for
from model_compose.engines.huggingface.forward import NAME, TransformersForward
from model_compose.engines.huggingface.loading import LoadedModel, load
from model_compose.engines.huggingface.prefix import CHUNK, PrefixCache
from model_compose.engines.stepping.sequence import Prompt, Sequence
from model_compose.errors import ComposeError, InputError, LoadError, Overloaded
from model_compose.generation import Chunk, Request, ResponseFormat, Sampling, collect
from model_compose.lora.blend import Blend
from model_compose.lora.layers import LoraModel
from model_compose.progress import silent
from tests import tiny
from tests.contracts.test_engine import GREEDY, make, text
from tests.engines.test_huggingface import opened
from tests.waiting import held, until

BLENDS = [Blend(), Blend({"alpaca": 0.7}), Blend({"pirate": 1.2}), Blend({"alpaca": 0.4, "pirate": -0.8})]
TEXTS = ["Hi", "The quick brown fox jumps over the lazy dog, and then", "x" * 90, "The quick brown fox sleeps. " * 5]
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4
"""Of the tiny base: keys and values, layers, heads, dim, float32."""


@pytest.fixture(scope="module")
def loaded(project: Path) -> LoadedModel:
    engine: Any = make("huggingface", project.parent)
    return load(engine._options, project.parent, silent)


@pytest.fixture(scope="module")
def references(project: Path) -> dict[tuple[str, int], list[int]]:
    """24 greedy tokens by transformers and PEFT, the adapters combined with `cat`."""
    base = AutoModelForCausalLM.from_pretrained(project.parent / "base").eval()
    model: Any = PeftModel.from_pretrained(base, project.parent / "alpaca", adapter_name="alpaca")
    model.load_adapter(project.parent / "pirate", adapter_name="pirate")
    found = {}
    for number, blend in enumerate(BLENDS):
        if blend.active:
            names, weights = list(blend.active), list(blend.active.values())
            model.add_weighted_adapter(names, weights, f"mix{number}", combination_type="cat")
            model.set_adapter(f"mix{number}")
        for prompt in TEXTS:
            ids = torch.tensor([tiny.tokenizer()(prompt)["input_ids"]])
            options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24}
            with torch.inference_mode():
                if blend.active:
                    out = model.generate(input_ids=ids, pad_token_id=tiny.EOS, **options)
                else:
                    with model.disable_adapter():
                        out = model.generate(input_ids=ids, pad_token_id=tiny.EOS, **options)
            found[prompt, number] = out[0, ids.shape[1] :].tolist()
    return found


class Run:
    """Sequences over one batch, stepped by hand."""

    def __init__(self, loaded: LoadedModel, budget: int, context: int = 256, **options: Any) -> None:
        self.loaded, self.context = loaded, context
        self.cache = KVCache(loaded.forward.layers, budget, context)
        self.batch = Batch(loaded.lora, loaded.forward, self.cache, **({"max_rows": 16} | options))
        self.out: dict[Sequence, list[Chunk | ComposeError]] = {}

    def add(self, prompt: str, blend: Blend, length: int = 24, **sampling: Any) -> Sequence:
        settings = {"max_output_length": length, "min_output_length": length, "do_sample": False} | sampling
        ids = tiny.tokenizer()(prompt)["input_ids"]
        nouns = Prompt(ids, blend, str(sorted(blend.active.items())), Sampling(**settings), self.context)
        sink: list[Chunk | ComposeError] = []
        sequence = Sequence(nouns, 0, self.loaded.eos, self.loaded.tokenizer, None, sink.append)
        self.out[sequence] = sink
        self.batch.add([sequence])
        return sequence

    def finish(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.batch.sequences:
                self.batch.step()  # gives the last rows back
                return
            self.batch.step()
        raise AssertionError("sequences starve")


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_schedule_gives_what_transformers_with_peft_gives(
    loaded: LoadedModel, references: dict[tuple[str, int], list[int]], data: st.DataObject
) -> None:
    """Any arrival order, blends, lengths, leaving clients, and a KV cache from roomy to so small that it preempts rows."""
    rows = data.draw(st.sampled_from([1, 2, 5, 16]))
    tokens = data.draw(st.sampled_from([256, 320, 512, 1024, 16_384]))
    run = Run(
        loaded, tokens * TOKEN_BYTES, max_rows=rows, prefix_cache=data.draw(st.booleans()),
        auto_fold=data.draw(st.booleans()), max_adapters=data.draw(st.sampled_from([None, 1, 2])),
    )  # fmt: skip
    wanted = []
    for _ in range(data.draw(st.integers(1, 10))):
        prompt, number = data.draw(st.sampled_from(TEXTS)), data.draw(st.integers(0, 3))
        length = data.draw(st.integers(1, 24))
        sequence = run.add(prompt, BLENDS[number], length)
        wanted.append((sequence, references[prompt, number][:length]))
        for _ in range(data.draw(st.integers(0, 6))):
            run.batch.step()
        if data.draw(st.integers(0, 9)) == 0:
            sequence.done = True  # its client left
    run.finish()
    for sequence, expected in wanted:
        assert sequence.tokens[len(sequence.tokens) - sequence.generated :] == expected[: sequence.generated]
        assert not sequence.failed
        assert sequence.generated == len(expected) or not isinstance(run.out[sequence][-1:], ComposeError)
    run.loaded.lora.unfold()
    kept = run.batch.prefixes.size if run.batch.prefixes else 0
    assert run.cache.spent == kept <= run.cache.budget, "every row was given back"
    assert not run.cache.blocks


def test_preemption_instead_of_out_of_memory(loaded: LoadedModel) -> None:
    """Four sequences that fit at first and not at the end; nobody is lost, and the oldest never goes."""
    run = Run(loaded, 4 * 128 * TOKEN_BYTES, prefix_cache=False)
    oldest, *others = [run.add("y" * 60 + str(number), BLENDS[number], 120) for number in range(4)]
    finished: list[Sequence] = []
    for _ in range(1000):
        run.batch.step()
        assert run.cache.spent <= run.cache.budget
        finished += [s for s in (oldest, *others) if s.done and s not in finished]
        if not run.batch.sequences:
            break
    assert run.batch.preemptions > 0
    assert finished[0] is oldest
    assert [sequence.generated for sequence in (oldest, *others)] == [120] * 4
    alone = Run(loaded, 1 << 24)
    again = alone.add("y" * 60 + "2", BLENDS[2], 120)
    alone.finish()
    assert again.tokens == others[1].tokens


def test_a_long_prompt_stalls_nobody(loaded: LoadedModel) -> None:
    """While it is read, those that decode get a token in every step, and a short prompt overtakes it."""
    run = Run(loaded, 1 << 24, context=4096)
    decoding = run.add("Hello", BLENDS[1], 40)
    run.batch.step()
    long = run.add("z" * 3000, BLENDS[2], 1)
    run.batch.step()
    short = run.add("Hi", BLENDS[0], 1)
    before = decoding.generated
    for step in range(1, 4):
        run.batch.step()
        assert decoding.generated == before + step
    assert short.done
    assert not long.done
    assert long.cached > 0


def test_a_prefix_is_computed_once_for_each_blend_and_never_serves_another(loaded: LoadedModel) -> None:
    system = "You are a helpful assistant that answers briefly. "
    run = Run(loaded, 1 << 24)

    def ask(question: str, blend: Blend) -> tuple[list[int], int]:
        sequence = run.add(system + question, blend, 12)
        run.finish()
        return sequence.tokens, sequence.reused

    first, reused = ask("Why?", BLENDS[1])
    assert reused == 0
    again, reused = ask("How?", BLENDS[1])
    assert reused == len(system)
    other, reused = ask("How?", Blend({"alpaca": 0.700001}))
    assert reused == 0, "another weight is another function"
    other, reused = ask("How?", BLENDS[3])
    assert reused == 0
    assert other != again, "changing only the weights changes the answer"
    fresh = Run(loaded, 1 << 24, prefix_cache=False)
    alone = fresh.add(system + "How?", BLENDS[1], 12)
    fresh.finish()
    assert alone.tokens == again
    assert run.batch.prefixes is not None
    assert run.batch.prefixes.hits == len(system)
    assert first != again


def test_prompts_at_once_that_start_alike_are_read_once(loaded: LoadedModel) -> None:
    """As n > 1 does: the second waits for the first one's prompt, then takes over what it has."""
    run = Run(loaded, 1 << 24)
    prompt = "w" * 200
    sequences = [run.add(prompt, BLENDS[1], 8) for _ in range(4)]
    stranger = run.add("v" * 20, BLENDS[1], 8)
    run.finish()
    assert [sequence.reused for sequence in sequences] == [0, 199, 199, 199]
    assert stranger.reused == 0
    assert len({tuple(sequence.tokens) for sequence in sequences}) == 1


def test_prefixes_give_way_to_sequences(loaded: LoadedModel) -> None:
    run = Run(loaded, 512 * TOKEN_BYTES)
    for number in range(12):
        run.add(f"{number}" * 100, BLENDS[number % 4], 4)
        run.finish()
        assert run.cache.spent <= run.cache.budget
    assert run.batch.preemptions == 0
    last = run.add("11" * 50, BLENDS[3], 4)
    run.finish()
    assert last.reused > 0, "the newest were kept"


def test_the_prefix_cache_finds_the_longest_and_keeps_no_part_twice() -> None:
    shape = LayerShape(1, 2, 2, torch.float32, torch.device("cpu"))
    cache = KVCache([shape], 1 << 20, 1024)
    prefixes = PrefixCache(cache)
    row = cache.take(200)
    assert row is not None
    tokens = list(range(100))
    prefixes.keep("one", tokens[:40], row)
    prefixes.keep("one", tokens, row)  # goes on where the first ends, and takes its place
    assert prefixes.size == 100 * shape.token_bytes
    prefixes.keep("one", tokens[:60], row)  # known
    assert prefixes.size == 100 * shape.token_bytes
    assert prefixes.find("one", [*tokens[:50], 7, 7])[1] == 50
    assert prefixes.find("two", tokens) == (None, 0)
    assert prefixes.find("one", tokens[: CHUNK - 1]) == (None, 0)
    prefixes.keep("one", [*tokens[:50], *range(500, 520)], row)
    assert prefixes.find("one", [*tokens[:50], *range(500, 510)])[1] == 60
    while prefixes.drop_one():
        pass
    assert (prefixes.size, prefixes._chunks) == (0, {})


def test_rows_move_without_loss_and_blocks_are_given_back() -> None:
    shape = LayerShape(2, 4, 4, torch.float32, torch.device("cpu"))
    cache = KVCache([shape] * 2, 1 << 20, 512)
    rows: dict[int, Any] = {}
    for number in range(20):
        row = cache.take(SMALLEST)
        assert row is not None
        row.block.keys[1][row.index] = number
        rows[number] = row
    for number in (0, 7, 19, 3, 8):
        cache.give_back(rows.pop(number))
    rows[5] = cache.grow(rows[5], 300, 10)
    for number, row in rows.items():
        assert row.block.used[row.index] is row
        assert (row.views(1, 10)[0] == number).all()
    for row in rows.values():
        cache.give_back(row)
    assert (cache.blocks, cache.spent) == ([], 0)


async def test_a_full_queue_is_a_429_that_harms_nobody(project: Path) -> None:
    engine = await opened(project.parent, options={"max_batch_size": 1, "max_queue": 1})
    with held(engine):
        running = [asyncio.create_task(text(engine, "Hello", BLENDS[1])) for _ in range(2)]
        await until(lambda: engine._loop is not None and engine._loop.load == 2)
        with pytest.raises(Overloaded, match="2 texts run or wait already") as caught:
            await text(engine, "Hello")
    assert caught.value.status == 429
    assert len(set(await asyncio.gather(*running))) == 1
    assert await text(engine, "Hello")
    await engine.close()


async def test_a_burst_fills_the_queue_no_further(project: Path) -> None:
    """Also when all of it comes before the first is tokenized."""
    engine = await opened(project.parent, options={"max_batch_size": 2, "max_queue": 3})
    found = await asyncio.gather(*(text(engine, "Hello", BLENDS[1]) for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(one, Overloaded) for one in found) == 15
    assert len({one for one in found if isinstance(one, str)}) == 1
    await engine.close()


async def test_a_client_that_leaves_gives_its_row_back_at_once(project: Path) -> None:
    engine = await opened(project.parent)
    endless = Sampling(max_output_length=200, min_output_length=200, do_sample=False)
    assert engine._cache is not None
    with held(engine) as thread:
        async with aclosing(engine.generate(Request("Hello", Blend(), endless))) as chunks:
            first = asyncio.ensure_future(anext(chunks))
            await thread.until(first.done)
            assert engine._cache.blocks
        thread.step()
        assert not engine._cache.blocks
    await engine.close()


async def test_architectures_with_attention_of_their_own_are_refused_by_name(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    base = tiny.save_base(tmp_path / "base", GPTJConfig(**sizes, n_positions=64))
    for name in ("alpaca", "pirate"):
        tiny.save_adapter(tmp_path / name, base)
    with pytest.raises(LoadError, match=r"\./base \(GPTJForCausalLM\) has attention of its own"):
        await opened(tmp_path)


async def test_the_kv_cache_limits_the_context(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = await opened(project.parent, options={"kv_cache": f"{128 * TOKEN_BYTES}B"})
    assert "holds 128 tokens" in caplog.text
    with pytest.raises(InputError, match="has 200 tokens, and this model's context holds 128"):
        await text(engine, "x" * 200)
    unlimited = Request("x" * 100, Blend(), Sampling(min_output_length=10_000, do_sample=False))
    assert (await collect(engine.generate(unlimited))).usage.completion_tokens == 28
    await engine.close()
    with pytest.raises(LoadError, match=r"one text needs 256; set a larger kv_cache, or a smaller max_context"):
        await opened(project.parent, options={"kv_cache": f"{128 * TOKEN_BYTES}B", "max_context": 200})


async def test_adapters_are_loaded_and_unloaded_while_requests_run(project: Path, tmp_path: Path) -> None:
    from model_compose.engines.options import AdapterOptions

    other = tiny.save_adapter(tmp_path / "other", project.parent / "base", seed=9, std=0.5)
    engine = await opened(project.parent)
    blend = Blend({"alpaca": 1.0})
    before = await text(engine, "Hello", blend)
    long = Sampling(max_output_length=100, min_output_length=100, do_sample=False)
    identity = engine.identity(blend)
    options = AdapterOptions.model_validate({"type": "lora", "name": "alpaca", "model": str(other)})
    with held(engine) as thread:
        slow = asyncio.create_task(text(engine, "Hello", blend, long))
        await thread.until(lambda: sum(thread.generated) >= 3)
        await thread.during(engine.load_adapter(options, silent))
        assert all(3 <= count < 100 for count in thread.generated)
    assert engine.identity(blend) != identity
    assert await text(engine, "Hello", blend) != before
    assert (await slow).startswith(before[:-1]), "a running request finishes on the old content"
    await engine.load_adapter(options.model_copy(update={"name": "third"}), silent)
    assert await text(engine, "Hello", Blend({"third": 1.0})) == await text(engine, "Hello", blend)
    await engine.unload_adapter("third")
    assert engine._loaded is not None
    await text(engine, "Hello")
    assert set(engine._loaded.lora.names) == {"alpaca'", "pirate"}
    await engine.close()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", ["lean", "transformers"])
async def test_a_quantised_base_takes_exact_adapters(tmp_path: Path, kind: str, family: str) -> None:
    """The lean decoder and transformers' code; rows do not disturb each other."""
    from tests.engines.test_huggingface import FAMILIES

    config = tiny.llama_config(hidden_size=64, intermediate_size=96) if family == "lean" else FAMILIES["gemma"]
    base = tiny.save_base(tmp_path / "base", config)
    for name in ("alpaca", "pirate"):
        tiny.save_adapter(tmp_path / name, base, std=0.5)
    engine = await opened(tmp_path, quantization=kind)
    alone = [await text(engine, f"Prompt {n}", blend) for n in range(2) for blend in BLENDS]
    together = await asyncio.gather(*(text(engine, f"Prompt {n}", blend) for n in range(2) for blend in BLENDS))
    assert together == alone
    assert len(set(alone)) > len(BLENDS)
    await engine.close()


async def test_a_response_format_is_kept_to(project: Path) -> None:
    engine = await opened(project.parent)
    sampling = Sampling(temperature=1.5, seed=1, response_format=ResponseFormat("regex", "[a-c]{3}-[0-9]{2}"))
    answers = await asyncio.gather(*(text(engine, "Hello", blend, sampling) for blend in BLENDS))
    import re

    assert all(re.fullmatch("[a-c]{3}-[0-9]{2}", answer) for answer in answers)
    with pytest.raises(InputError, match="response_format"):
        await text(engine, "Hello", Blend(), Sampling(response_format=ResponseFormat("regex", "(")))
    assert await text(engine, "Hello", Blend(), GREEDY)
    await engine.close()


@pytest.mark.parametrize("way", ["native", "torch", "native bfloat16"])
def test_the_lean_decoder_is_transformers_code(loaded: LoadedModel, way: str) -> None:
    """The same logits, for prompts, decoding and blends in one pass. In bfloat16 the cache alone is rounded."""
    folder, adapters = str(loaded.model.name_or_path), loaded.lora.adapters.values()
    dtype = torch.bfloat16 if way == "native bfloat16" else torch.float32

    def base(dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=NAME).eval()

    plain = base(dtype).float()
    lean = base(dtype)
    native = native_for(lean, torch.device("cpu")) if "native" in way else None
    if native is None and way != "torch":
        pytest.skip("no C compiler")
    ours, theirs = LoraModel(lean, adapters, dtype=torch.float32), LoraModel(plain, adapters)
    outs = []
    for owner, forward in (
        (ours, LlamaForward(ours, None, native)),
        (theirs, TransformersForward(plain, torch.device("cpu"), "tiny")),
    ):
        cache = KVCache(forward.layers, 1 << 24, 256)
        rows = [cache.take(100) for _ in BLENDS]
        logits = []
        starts = [0] * 4
        for lengths in ([5, 1, 60, 2], [1, 1, 1, 7], [1, 1, 1, 1]):
            pieces = [
                Piece(row, [(7 * s + i) % 250 + 2 for i in range(n)], s)
                for row, n, s in zip(rows, lengths, starts, strict=True)
                if row is not None
            ]
            starts = [s + n for s, n in zip(starts, lengths, strict=True)]
            step = Pass(pieces, torch.device("cpu"))
            with torch.inference_mode(), owner.use([BLENDS[i] for i in step.order], step.counts) as mix:
                found = forward(step, mix)
            logits.append(found[torch.tensor(step.order).argsort()])
        outs.append(torch.stack(logits))
    assert (outs[0] - outs[1]).abs().max() / outs[1].abs().max() < (1e-5 if dtype == torch.float32 else 1e-2)
