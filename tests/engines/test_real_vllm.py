"""vLLM itself, where MODEL_COMPOSE_VLLM_PYTHON is set: the embedded engine's function of the input, and its limits.

What every engine promises is in tests/contracts. One server for all tests, as a start takes half a minute.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from model_compose.engines import Engine
from model_compose.engines.vllm.engine import VllmEngine
from model_compose.errors import AdapterError, InputError
from model_compose.generation import Request, ResponseFormat, Sampling, collect
from model_compose.lora.blend import Blend
from model_compose.progress import silent
from tests import tiny
from tests.contracts.test_engine import KNOWN, make, text

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(bool(KNOWN["vllm"].missing), reason=KNOWN["vllm"].missing or ""),
]
ADAPTERS: dict[str, dict[str, Any]] = {
    "alpaca": {"std": 0.1},
    "pirate": {"std": 0.1, "r": 2, "target_modules": ["o_proj", "down_proj"]},
    "all": {"std": 0.1, "r": 3, "target_modules": "all-linear", "rank_pattern": {"q_proj": 5}, "use_rslora": True},
    "words": {"std": 0.1, "r": 2, "target_modules": ["embed_tokens"]},
    "head": {"std": 0.1, "r": 2, "target_modules": ["lm_head"]},
}
BLENDS = [
    *(Blend({name: 1.0}) for name in ADAPTERS),
    Blend({"alpaca": 0.7, "pirate": -0.8, "all": 0.5}),
    Blend(dict.fromkeys(ADAPTERS, 0.5)),
]
PROMPTS = ("Hello", "The quick brown fox", "x" * 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    base = tiny.save_base(folder / "base", tiny.llama_config(**KNOWN["vllm"].sizes))
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        file = tiny.save_adapter(folder / name, base, seed=seed, **options) / "adapter_model.safetensors"
        if name in ("words", "head"):  # as with save_embedding_layers=False, which peft's own save lacks here
            save_file({key: value for key, value in load_file(file).items() if "lora" in key}, file)
    tiny.save_adapter(folder / "copies", base, target_modules=["embed_tokens"])
    return folder


def of(driver: str, folder: Path, names: Any = tuple(ADAPTERS), **options: Any) -> Engine:
    adapters = [{"type": "lora", "name": name, "model": f"./{name}", "weight": 0} for name in names]
    return make(driver, folder, peft_adapters=adapters, options=options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(folder: Path) -> AsyncIterator[tuple[VllmEngine, Engine]]:
    """vLLM with fewer places than there are blends, and the embedded engine."""
    ours, reference = of("vllm", folder, max_loras=3), of("huggingface", folder)
    assert isinstance(ours, VllmEngine)
    await reference.open(silent)
    await ours.open(silent)
    yield ours, reference
    await ours.close()
    await reference.close()


async def logprobs(engine: Engine, prompt: str, blend: Blend) -> list[float]:
    """The 20 best of the next token."""
    sampling = Sampling(2, 2, do_sample=False, logprobs=20)  # an end of the text would tell none
    completion = await collect(engine.generate(Request(prompt, blend, sampling)))
    return [value for _, value in completion.texts[0].logprobs[0].top]


def distance(ours: list[float], reference: list[float]) -> float:
    """max|ours - reference| / max|reference|, as rounding grows with what is rounded."""
    return max(abs(a - b) for a, b in zip(ours, reference, strict=True)) / max(map(abs, reference))


@pytest.mark.parametrize("at_once", [False, True])
async def test_blends_are_as_near_to_the_embedded_engine_as_the_bare_base(
    engines: tuple[VllmEngine, Engine], at_once: bool
) -> None:
    """In float32. At once: rows of all blends and of the bare base in one batch, and more blends than places."""
    wanted = [(prompt, blend) for blend in (Blend(), *BLENDS) for prompt in PROMPTS]
    reference = [await logprobs(engines[1], *each) for each in wanted]
    asked = [logprobs(engines[0], *each) for each in wanted]
    ours = await asyncio.gather(*asked) if at_once else [await each for each in asked]
    distances = [distance(*pair) for pair in zip(ours, reference, strict=True)]
    noise = max(distances[: len(PROMPTS)])
    assert noise < 1e-6
    assert max(distances) < 10 * noise, distances
    effects = [distance(row, reference[index % len(PROMPTS)]) for index, row in enumerate(reference[len(PROMPTS) :])]
    assert min(effects) > 1000 * noise


async def test_sampling_is_the_embedded_engines(engines: tuple[VllmEngine, Engine]) -> None:
    for sampling in (
        Sampling(20, 20, do_sample=False, repetition_penalty=1.7),
        Sampling(20, 20, do_sample=False, presence_penalty=2.0, frequency_penalty=1.5),
        Sampling(20, 20, do_sample=False, logit_bias=((50, 100.0),)),
        Sampling(20, 20, temperature=0.0),
        Sampling(20, 20, top_k=1),
    ):
        ours, theirs = [await text(engine, "Hello", BLENDS[0], sampling) for engine in engines]
        assert ours == theirs, sampling
    with pytest.raises(InputError, match="logit_bias names the token 300, but this model has the tokens 0 to 257"):
        await text(engines[0], "Hello", sampling=Sampling(2, logit_bias=((300, 1.0),)))


async def test_a_response_format_is_kept_to(engines: tuple[VllmEngine, Engine]) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    sampling = Sampling(200, do_sample=False, response_format=ResponseFormat("json_schema", json.dumps(schema)))
    assert json.loads(await text(engines[0], "Hello", BLENDS[0], sampling))["a"] in ("x", "y")
    sampling = Sampling(60, do_sample=False, response_format=ResponseFormat("regex", "(ab){3}"))
    assert await text(engines[0], "Hello", BLENDS[0], sampling) == "ababab"
    wrong = Sampling(60, response_format=ResponseFormat("json_schema", '{"type": "wizard"}'))
    with pytest.raises(InputError, match=r"the response_format cannot be kept to: .*wizard"):
        await text(engines[0], "Hello", BLENDS[0], wrong)


async def test_an_adapter_that_brings_the_bases_embedding_is_refused_before_the_start(folder: Path) -> None:
    engine = of("vllm", folder, ("copies",))
    with pytest.raises(AdapterError, match=r"adapter 'copies': it brings its own 'model.embed_tokens.weight'"):
        await engine.open(silent)
