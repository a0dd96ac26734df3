"""Blends by a method on the embedded engine: the same text as transformers with the merged weights, whoever else runs."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from model_compose.engines import sizes
from model_compose.engines.blueprint import Blueprint, on_meta
from model_compose.engines.devices import Devices
from model_compose.engines.huggingface import batch, memory
from model_compose.engines.huggingface.loading import LoadedModel, load
from model_compose.engines.needs import Needs, check_fits
from model_compose.engines.options import AdapterOptions
from model_compose.engines.stepping import low_rank
from model_compose.errors import InputError, LoadError
from model_compose.generation import Sampling
from model_compose.lora.adapter import read_adapter
from model_compose.lora.blend import Blend
from model_compose.lora.layers import LoraModel
from model_compose.lora.methods import Method
from model_compose.lora.methods.dare_linear import DareLinear
from model_compose.lora.methods.svd import Svd
from model_compose.lora.methods.ties import Ties
from model_compose.progress import Progress, silent
from tests import tiny
from tests.contracts.test_engine import GREEDY, make, text
from tests.engines.test_batch import TOKEN_BYTES, Run
from tests.engines.test_huggingface import detokenized, opened
from tests.waiting import held

WEIGHTS = {"alpaca": 1.5, "pirate": 0.7}
FILE = {
    "merged": {"method": "ties", "density": 0.4, "weights": WEIGHTS},
    "small": {"method": "svd", "rank": 1, "weights": WEIGHTS},
}
MERGED, SMALL = Blend(WEIGHTS, "merged", Ties(density=0.4)), Blend(WEIGHTS, "small", Svd(rank=1))
EXACT = [Blend(), Blend(WEIGHTS), Blend({"pirate": 1.2})]
TEXTS = ["Hi", "The quick brown fox jumps over the lazy dog, and then", "x" * 90]


def merged_by_hand(folder: Path, blend: Blend) -> Any:
    """transformers' model with the blend in its dense weights: by peft for TIES, by a dense SVD for svd."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    loaded = {name: read_adapter(folder / name, name) for name in blend.active}
    for path in {path for adapter in loaded.values() for path in adapter.modules}:
        using = [name for name in blend.active if path in loaded[name].modules]
        parts = [loaded[name].modules[path] for name in using]
        deltas = [factors.scaling * (factors.b @ factors.a) for factors in parts]
        weights = torch.tensor([blend.weights[name] for name in using])
        if isinstance(blend.method, Ties):
            change = merge_utils.ties(deltas, weights, blend.method.density)
        else:
            change = merge_utils.task_arithmetic(deltas, weights)
        if isinstance(blend.method, Svd):
            u, s, vt = torch.linalg.svd(change, full_matrices=False)
            change = u[:, : blend.method.rank] * s[: blend.method.rank] @ vt[: blend.method.rank]
        model.get_submodule(path).weight.data += change
    return model


def generated(model: Any, prompt: str, length: int = 16) -> list[int]:
    ids = torch.tensor([tiny.tokenizer()(prompt)["input_ids"]])
    out = model.generate(
        input_ids=ids, do_sample=False, max_new_tokens=length, min_new_tokens=length, pad_token_id=tiny.EOS
    )
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


@pytest.fixture(scope="module")
def references(project: Path) -> dict[tuple[str, int], list[int]]:
    models = [merged_by_hand(project.parent, blend) for blend in (MERGED, SMALL, *EXACT)]
    return {(prompt, number): generated(model, prompt, 24) for number, model in enumerate(models) for prompt in TEXTS}


async def test_named_blends_run_by_their_method_beside_any_others(project: Path) -> None:
    """At once, in any order; each text is that of the merged weights. svd shares the batch, TIES waits for its turn."""
    engine = await opened(project.parent, blends=FILE)
    blends = [EXACT[1], MERGED, SMALL, EXACT[0], MERGED, EXACT[2], SMALL]
    prompt = tiny.tokenizer()("Hello")["input_ids"]
    expected = [detokenized(prompt, generated(merged_by_hand(project.parent, blend), "Hello")) for blend in blends]
    assert len(set(expected)) == 5
    assert await asyncio.gather(*(text(engine, "Hello", blend) for blend in blends)) == expected
    assert [await text(engine, "Hello", blend) for blend in reversed(blends)] == expected[::-1]
    identities = {engine.identity(blend) for blend in (MERGED, SMALL, *EXACT)}
    assert len(identities) == 5
    assert engine._loaded is not None
    assert len(engine._loaded.lora.names) == 3, "svd was made once"
    await engine.close()


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_schedule_gives_what_the_merged_weights_give(
    merging: LoadedModel,
    references: dict[tuple[str, int], list[int]],
    data: st.DataObject,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a blend that needs the batch to itself, preemption, prefixes and `fold: auto` of the others."""
    monkeypatch.setattr(batch, "FOLD_AFTER", data.draw(st.sampled_from([1, 4, 256])))
    run = Run(
        merging, data.draw(st.sampled_from([256, 512, 16_384])) * TOKEN_BYTES,
        max_rows=data.draw(st.sampled_from([1, 3, 16])), prefix_cache=data.draw(st.booleans()),
        auto_fold=data.draw(st.booleans()), max_adapters=data.draw(st.sampled_from([None, 1])),
    )  # fmt: skip
    ready = [MERGED, Blend({"small": 1.0}), *EXACT]
    wanted = []
    for _ in range(data.draw(st.integers(1, 8))):
        prompt, number = data.draw(st.sampled_from(TEXTS)), data.draw(st.sampled_from([0, 0, 1, 2, 3, 4]))
        length = data.draw(st.integers(1, 24))
        sequence = run.add(prompt, ready[number], length)
        # A prefix must serve one function alone.
        sequence.identity = str(number)
        wanted.append((sequence, references[prompt, number][:length]))
        for _ in range(data.draw(st.integers(0, 6))):
            run.batch.step()
            running = [one.blend for one in run.batch.running]
            assert not any(one.full_rank for one in running) or all(one.equals(running[0]) for one in running)
        if data.draw(st.integers(0, 9)) == 0:
            sequence.done = True
    run.finish()
    for sequence, expected in wanted:
        assert not sequence.failed
        assert sequence.tokens[len(sequence.tokens) - sequence.generated :] == expected[: sequence.generated]
    run.loaded.lora.unfold(keep=True)


@pytest.fixture(scope="module")
def merging(project: Path) -> LoadedModel:
    from dataclasses import replace

    from model_compose.lora.blend import stack

    engine: Any = make("huggingface", project.parent)
    loaded = load(engine._options, project.parent, silent)
    loaded.lora.load(replace(stack(SMALL, loaded.lora.adapters), name="small"))
    return loaded


def test_nobody_starves(merging: LoadedModel) -> None:
    """Texts come in the order of their groups: those behind one that needs the batch to itself wait with it."""
    run = Run(merging, 1 << 24)
    first = [run.add(f"{n}", EXACT[n % 3], 12) for n in range(3)]
    alone = [run.add(f"{n}", MERGED, 8) for n in range(2)]
    behind = run.add("Hi", EXACT[1], 2)
    later = run.add("Hi", MERGED, 2)
    ended: list[Any] = []
    while run.batch.sequences:
        run.batch.step()
        ended += [one for one in (*first, *alone, behind, later) if one.done and one not in ended]
    assert set(ended[:3]) == set(first)
    assert set(ended[3:5]) == set(alone)
    assert ended[5:] == [behind, later]
    run.loaded.lora.unfold(keep=True)


async def test_it_is_folded_while_the_model_loads_and_then_swapped(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make("huggingface", project.parent, blends=FILE)
    reports: list[Progress] = []
    await engine.open(reports.append)
    assert "folding the blend 'merged' (ties)" in {report.what for report in reports}

    def never(*_: Any) -> None:
        raise AssertionError("a request folds nothing anew")

    monkeypatch.setattr(LoraModel, "_fold", never)
    first = await text(engine, "Hello", MERGED)
    await text(engine, "Hello", EXACT[1])
    assert await text(engine, "Hello", MERGED) == first
    await engine.close()


async def test_no_memory_for_the_copy_is_a_load_error(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(LoraModel, "_fold", short)
    with pytest.raises(LoadError, match=r"no memory for the blend 'merged' \(ties\), whose weights take .* besides"):
        await opened(project.parent, blends=FILE, options={"fold": "auto"})


async def test_in_bfloat16_it_is_folded_as_well(project: Path) -> None:
    engine = await opened(project.parent, blends=FILE, precision="bfloat16")
    assert len({await text(engine, "Hello", blend) for blend in (MERGED, SMALL, EXACT[0])}) == 3
    await engine.close()


async def test_an_adapter_that_is_loaded_again_changes_the_blends_that_use_it(project: Path, tmp_path: Path) -> None:
    other = tiny.save_adapter(tmp_path / "other", project.parent / "base", seed=9, std=0.5)
    engine = await opened(project.parent, blends=FILE)
    before = {blend.name: (await text(engine, "Hello", blend), engine.identity(blend)) for blend in (MERGED, SMALL)}
    long = Sampling(max_output_length=100, min_output_length=100, do_sample=False)
    options = AdapterOptions.model_validate({"type": "lora", "name": "alpaca", "model": str(other)})
    with held(engine) as thread:
        slow = asyncio.create_task(text(engine, "Hello", MERGED, long))
        await thread.until(lambda: sum(thread.generated) >= 3)
        await thread.during(engine.load_adapter(options, silent))
        assert all(3 <= count < 100 for count in thread.generated)
    after = {blend.name: (await text(engine, "Hello", blend), engine.identity(blend)) for blend in (MERGED, SMALL)}
    assert all(old != new for name in after for old, new in zip(before[name], after[name], strict=True))
    assert (await slow).startswith(before["merged"][0][:-1]), "a running request finishes on the old content"
    await engine.close()


async def test_adapters_made_for_svd_do_not_pile_up(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many different ones as the Python API likes to ask for, some of them while they are about to leave."""
    monkeypatch.setattr(low_rank, "KEPT", 2)
    engine = await opened(project.parent)
    blends = [Blend({"alpaca": 0.5 + number / 4}, method=Svd(rank=1)) for number in range(5)]
    alone = [await text(engine, "Hello", blend) for blend in blends]
    together = await asyncio.gather(*(text(engine, "Hello", blend) for blend in [*blends, *blends[::-1]]))
    assert together == [*alone, *alone[::-1]]
    await text(engine, "Hello")
    assert engine._loaded is not None
    assert len(engine._loaded.lora.names) == 2 + 2
    await engine.close()


@pytest.mark.parametrize("method", [Ties(density=0.3), DareLinear(density=0.4)], ids=str)
async def test_a_copy_of_the_weights_is_for_the_files_blend_alone(project: Path, method: Method) -> None:
    engine = await opened(project.parent, blends=FILE)
    with pytest.raises(
        InputError, match=rf"'mine' \({method.method}\) has full rank and runs folded.*under the file's"
    ):
        await text(engine, "Hello", Blend(WEIGHTS, "mine", method))
    await engine.close()


DARE = {"method": "dare_ties", "density": 0.4, "weights": WEIGHTS}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"blends": FILE | {"other": DARE}}, "the blends 'merged' (ties) and 'other' (dare_ties) have full rank and run"),
        ({"blends": FILE, "quantization": "int8"}, "a quantised base is never folded; use method: svd"),
        ({"blends": FILE, "options": {"fold": "always"}}, "but fold: always takes the default blend alone; use method"),
        ({"blends": FILE, "options": {"fold": "never"}}, "and fold is never; use method: svd, or set fold: auto"),
    ],
)  # fmt: skip
def test_what_cannot_be_folded_is_refused_by_name(project: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make("huggingface", project.parent, **changes)
    assert told in str(caught.value)


async def test_svd_runs_on_a_quantised_base(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", tiny.llama_config(hidden_size=64, intermediate_size=96))
    for seed, name in enumerate(("alpaca", "pirate")):
        tiny.save_adapter(tmp_path / name, base, std=0.5, seed=seed)
    engine = await opened(tmp_path, quantization="int8", blends={"small": FILE["small"]})
    assert len({await text(engine, "Hello", blend) for blend in (SMALL, EXACT[0], EXACT[1])}) == 3
    await engine.close()


async def test_fold_always_takes_no_blend_of_the_same_weights_by_a_method(project: Path) -> None:
    engine = await opened(project.parent, blends={"small": FILE["small"]}, options={"fold": "always"})
    same = Blend({"alpaca": 1.0, "pirate": 1.0}, method=Svd(rank=1))
    assert await text(engine, "Hello", Blend(same.weights), GREEDY)
    with pytest.raises(InputError, match=r"fold: always.*takes no other"):
        await text(engine, "Hello", same)
    await engine.close()


def test_memory_counts_the_copy_and_what_svd_makes(project: Path) -> None:
    engine: Any = make("huggingface", project.parent, blends=FILE)
    options, loaded = engine._options, load(engine._options, project.parent, silent)
    config = tiny.llama_config()
    blueprint = Blueprint("tiny", config, on_meta(config, False))
    adapters = {name: sizes.loaded_size(adapter) for name, adapter in loaded.lora.adapters.items()}

    def needed(what: Any) -> Needs:
        (found,) = memory.needs(what, blueprint, adapters, sizes.Checkpoint(), Devices())
        return found

    with_methods, without = needed(options), needed(options.model_copy(update={"blends": {}}))
    touched = {path for adapter in loaded.lora.adapters.values() for path in adapter.modules}
    weights = sum(sizes.weight_of(loaded.model, path).nbytes for path in touched)
    assert with_methods.full_rank == weights
    assert without.full_rank == 0
    size = with_methods.adapters["'small' (svd)"]
    shapes = loaded.lora.adapters
    rank_1 = {path: f for adapter in shapes.values() for path, f in adapter.modules.items()}
    assert size == 4 * sum(f.a.shape[1] + f.b.shape[0] for f in rank_1.values())
    assert with_methods.least - without.least == weights + 2 * size
    with pytest.raises(LoadError, match="the weights of the blend of full rank"):
        check_fits(Needs("tiny", "cpu", free=100, base=50, full_rank=60, smaller={"precision: bfloat16": 25}))
