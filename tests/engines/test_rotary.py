"""Rotary embeddings that change with a text's length: each row has those of its own length, whatever shares its pass."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Phi3Config, PhimoeConfig

from model_compose.engines.huggingface.loading import LoadedModel, load
from model_compose.engines.stepping.sequence import Sequence
from model_compose.generation import Chunk
from model_compose.progress import silent
from tests import tiny
from tests.contracts.test_engine import make
from tests.engines.test_batch import BLENDS, Run

SWITCH = 48
"""The tiny models' original length, in tokens; a byte is a token."""

LENGTHS = (5, 40, SWITCH, SWITCH + 1, 150)
"""Of prompts: the first stays below the switch, the next two cross it as they grow, the last is read in pieces."""

DRAWN = 16
TEXT = "The quick brown fox jumps over the lazy dog while seventeen grey cats watch it from a wall. " * 3


def longrope(head_dim: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": SWITCH,
        "short_factor": [1.0 + 0.1 * i for i in range(head_dim // 2)],
        "long_factor": [2.0 + 1.5 * i for i in range(head_dim // 2)],
        **more,
    }


SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 256, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS,
    "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip

CONFIGS: dict[str, Any] = {
    "llama": tiny.llama_config(rope_parameters=longrope(8)),
    "phi3": Phi3Config(**SIZES, original_max_position_embeddings=SWITCH, rope_parameters=longrope(8)),
    "phimoe": PhimoeConfig(
        **SIZES, num_local_experts=2, rope_parameters=longrope(8, short_mscale=1.1, long_mscale=1.3)
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=64, layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}, "full_attention": longrope(8)
        },
    ),
    "dynamic": tiny.llama_config(
        max_position_embeddings=256, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    base = tiny.save_base(folder / "base", CONFIGS[request.param])
    targets = ["qkv_proj", "o_proj"] if request.param == "phi3" else ["q_proj", "v_proj"]
    tiny.save_adapter(folder / "alpaca", base, seed=1, std=0.5, target_modules=targets)
    tiny.save_adapter(folder / "pirate", base, seed=2, std=0.5, r=2, target_modules=["o_proj"])
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    engine: Any = make("huggingface", folder)
    return load(engine._options, folder, silent)


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[tuple[int, int], tuple[list[int], torch.Tensor]]:
    """Greedy tokens by transformers and PEFT, and the log-probability of each, without a cache that might be stale."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model: Any = PeftModel.from_pretrained(base, folder / "alpaca", adapter_name="alpaca")
    model.load_adapter(folder / "pirate", adapter_name="pirate")
    found = {}
    for number, blend in enumerate(BLENDS):
        if blend.active:
            model.add_weighted_adapter(
                list(blend.active), list(blend.active.values()), f"mix{number}", combination_type="cat"
            )
            model.set_adapter(f"mix{number}")
        for length in LENGTHS:
            ids = torch.tensor([tiny.tokenizer()(TEXT[:length])["input_ids"]])
            with torch.inference_mode(), nullcontext() if blend.active else model.disable_adapter():
                out = model.generate(
                    input_ids=ids, pad_token_id=tiny.EOS, do_sample=False, max_new_tokens=DRAWN, min_new_tokens=DRAWN,
                    output_logits=True, return_dict_in_generate=True, use_cache=False,
                )  # fmt: skip
            drawn = out.sequences[0, length:]
            scores = torch.cat(out.logits).log_softmax(dim=-1)
            found[length, number] = (drawn.tolist(), scores.gather(1, drawn[:, None])[:, 0])
    return found


class Rows(Run):
    """Sequences over one batch, which tell the log-probabilities of what they draw."""

    def ask(self, length: int, number: int) -> Sequence:
        return self.add(TEXT[:length], BLENDS[number], DRAWN, logprobs=0)

    def check(self, sequence: Sequence, wanted: tuple[list[int], torch.Tensor]) -> None:
        tokens, scores = wanted
        assert sequence.tokens[-DRAWN:] == tokens
        told = [one.logprob for chunk in self.out[sequence] if isinstance(chunk, Chunk) for one in chunk.logprobs]
        assert (torch.tensor(told) - scores).abs().max() < 1e-4


def test_a_row_alone_has_the_factors_of_its_length(loaded: LoadedModel, references: dict[Any, Any]) -> None:
    for length in LENGTHS:
        run = Rows(loaded, 1 << 24)
        sequence = run.ask(length, 3)
        run.finish()
        run.check(sequence, references[length, 3])


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("tokens", [320, 16_384])
def test_rows_of_all_lengths_and_blends_share_passes(
    loaded: LoadedModel, references: dict[Any, Any], prefix_cache: bool, tokens: int
) -> None:
    """With a KV cache from roomy to so small that rows are preempted; all prompts start alike, in both orders of coming."""
    per_token = sum(shape.token_bytes for shape in loaded.forward.layers)
    run = Rows(loaded, tokens * per_token, prefix_cache=prefix_cache)
    asked = [(length, number) for length in LENGTHS for number in range(len(BLENDS))]
    for order in (asked, asked[::-1]):
        sequences = []
        for length, number in order:
            sequences.append(run.ask(length, number))
            run.batch.step()
        run.finish()
        for sequence, key in zip(sequences, order, strict=True):
            run.check(sequence, references[key])


def test_a_prefix_serves_texts_on_its_own_side_of_the_switch(
    folder: Path, loaded: LoadedModel, references: dict[Any, Any]
) -> None:
    run = Rows(loaded, 1 << 24)

    def reused(length: int) -> int:
        sequence = run.ask(length, 1)
        run.finish()
        run.check(sequence, references[length, 1])
        return sequence.reused

    assert reused(150) == 0
    if loaded.forward.switch is None:
        assert reused(40) == 39
        return
    assert reused(40) == 0, "what was kept is of a text beyond the switch"
    assert reused(SWITCH + 1) == SWITCH, "as this one is"
    short = run.add(TEXT[:40], BLENDS[1], 4)
    run.finish()
    assert short.reused == 0, "the text of 40 tokens was kept as it ended, beyond the switch"
    again = run.add(TEXT[:40], BLENDS[1], 4)
    run.finish()
    assert (again.reused, again.tokens) == (39, short.tokens)


def test_transformers_computes_a_text_again_where_it_crosses(folder: Path, references: dict[Any, Any]) -> None:
    """Its cache for Phi-3 gives what it gives without one; so the references are what its users have."""
    if "phi3" not in folder.name:
        pytest.skip("of Phi-3")
    base: Any = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    for length in LENGTHS:
        ids = torch.tensor([tiny.tokenizer()(TEXT[:length])["input_ids"]])
        with torch.inference_mode():
            out = base.generate(ids, do_sample=False, max_new_tokens=DRAWN, min_new_tokens=DRAWN, pad_token_id=tiny.EOS)
        assert out[0, length:].tolist() == references[length, 0][0]
