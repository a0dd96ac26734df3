"""Every causal architecture that transformers knows is served exactly, or refused with the reason.

A tiny model of each, all its parameters random, is loaded with two adapters on all its layers and computes four rows of
unequal lengths and blends in common passes. Its logits are those that transformers computes from W + Σ w s B A, or `load`
says why it does not take the model.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KINDS
from transformers.pytorch_utils import Conv1D

from model_compose.engines.huggingface.attention import Pass, Piece
from model_compose.engines.huggingface.cache import KVCache
from model_compose.engines.huggingface.loading import LoadedModel, load
from model_compose.engines.sizes import kv_bytes_per_token
from model_compose.errors import AdapterError, LoadError
from model_compose.lora.adapter import Factors, LoraAdapter, write_adapter
from model_compose.lora.layers import module_shapes
from model_compose.progress import silent
from tests import tiny
from tests.architectures import SIZES, UNMADE, tiny_config
from tests.contracts.test_engine import BLENDS, make

LENGTHS = (5, 1, 40, 23)
"""Of the rows' prompts; the sliding windows are 8."""

DECODED = 10

SERVED = "served"

TABLE = {
    SERVED: """
        afmoe apertus arcee aria_text axk1 beam biogpt bitnet cohere cohere2 cohere2_moe cohere_compass_text ctrl
        cwm deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint fuyu gemma gemma2
        gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite
        got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa
        granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe
        kolibri1 laguna llama longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral
        ministral3 mistral mixtral modernbert-decoder moshi moss_transcribe_diarize nanochat nemotron olmo olmo2
        olmo3 olmoe opt persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3
        solar_open stablelm starcoder2 vaultgemma whisper youtu
    """,
    "layers of kind": """
        axk2 bailing_hybrid bamba deepseek_v32 deepseek_v4 dots3_note_text falcon_h1 falcon_mamba glm_moe_dsa
        granitemoehybrid hy_v4 inkling2_text inkling_text jamba kimi_linear lfm2 lfm2_moe lfm3 llama4 llama4_text
        mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next
        recurrent_gemma zamba zamba2 zaya
    """,
    "has no attention heads": """
        rwkv xlstm
    """,
    "lets tokens attend to later ones": """
        bert bert-generation camembert data2vec-text electra ernie roberta roberta-prelayernorm roc_bert xlm-roberta
        xlm-roberta-xl xmod
    """,
    "computes a token from more than its own position and attention": """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart pegasus plbart
    """,
    "has attention of its own": """
        big_bird bloom codegen cpmant falcon git gpt_neo gpt_neox_japanese gptj megatron-bert mvp openai-gpt
        prophetnet reformer rembert roformer trocr xglm xlm xlnet
    """,
    "calls attention more than once in layer 0": """
        diffllama hrm_text
    """,
    "gives attention a mask of its own in layer 0": """
        doge
    """,
    "masks attention in layer 0 by what tokens are": """
        gemma4_unified
    """,
    "cannot be run as the embedded engine does": """
        mpt
    """,
    "Unrecognized configuration class": """
        emu3 mllama
    """,
}
"""Which kinds are served, and what is said of those that are refused."""

OUTCOMES = {kind: outcome for outcome, kinds in TABLE.items() for kind in kinds.split()}

UNFIT = {"fuyu": "vision_embed_tokens", "longcat_flash": "classifier", "phimoe": "router"}
"""Modules to which an adapter cannot be added, see below."""

OTHER_HEADS = ("jetmoe", "mimo_v2_flash")
"""Kinds whose configs name key heads in a way of their own, so that `plan` counts fewer than there are."""

LLAMAS: dict[str, PreTrainedConfig] = {
    "biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "yarn": LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
    "mistral, sliding": MistralConfig(**SIZES, sliding_window=8),
    "qwen2, both kinds of layer": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=8, layer_types=["full_attention", "sliding_attention"]
    ),
    "qwen3, tied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}
"""Of the lean decoder's."""


@dataclass(frozen=True)
class Made:
    """A tiny model and its adapters, in a folder; the adapters' factors in memory, too."""

    adapters: dict[str, LoraAdapter]
    folder: Path

    def load(self) -> LoadedModel:
        engine: Any = make("huggingface", self.folder)
        return load(engine._options, self.folder, silent)


def made(config: PreTrainedConfig, folder: Path, unfit: str | None = None) -> Made:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # what starts as 0 or 1 would hide its part
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * (0.1 if tensor.ndim < 2 else 0.15))
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    head = model.get_output_embeddings()
    shapes = {
        path: shape
        for path, shape in module_shapes(model).items()
        if model.get_submodule(path) is not head and (unfit is None or unfit not in path)
        if shape.kind != "embedding" or shape.inputs == tiny.VOCABULARY
    }
    adapters = {}
    for rank, name in enumerate(("alpaca", "pirate"), start=2):
        factors = {
            path: Factors(
                torch.randn(rank, shape.inputs) * 0.1, torch.randn(shape.outputs, rank) * 0.1, 1.0,
                shape.kind == "embedding",
            )
            for number, (path, shape) in enumerate(shapes.items())
            if number % 3 != rank  # each leaves some out
        }  # fmt: skip
        adapters[name] = LoraAdapter(name, factors, "")
        write_adapter(adapters[name], folder / name)
    return Made(adapters, folder)


def logits(loaded: LoadedModel, texts: list[list[int]]) -> dict[tuple[int, int], Tensor]:
    """By (row, length): the rows come one after the other, read their prompts in pieces, and decode together."""
    cache = KVCache(loaded.forward.layers, 1 << 26, 128)
    rows = [cache.take(100) for _ in texts]
    done, found = [0] * len(rows), {}
    steps = [
        [5, 0, 17, 0],
        [1, 1, 23, 0],
        [1, 1, 1, 23],
        *[[1] * 4] * (DECODED - 2),
        [0, 1, 1, 1],
        [0, 0, 0, 1],
        [0, 0, 0, 1],
    ]
    for counts in steps:
        numbers = [number for number, count in enumerate(counts) if count]
        pieces = []
        for number in numbers:
            row, start = rows[number], done[number]
            assert row is not None
            done[number] += counts[number]
            pieces.append(Piece(row, texts[number][start : done[number]], start))
        step = Pass(pieces, torch.device("cpu"))
        blends = [BLENDS[numbers[at]] for at in step.order]
        with torch.inference_mode(), loaded.lora.use(blends, step.counts) as mix:
            out = loaded.forward(step, mix)
        assert len(out) == len(numbers)
        for row_logits, at in zip(out, step.order, strict=True):
            found[numbers[at], done[numbers[at]]] = row_logits
    return found


def merged(base: nn.Module, made: Made, number: int) -> Any:
    """The base with a blend in its weights, summed in float64."""
    model: Any = copy.deepcopy(base)
    head = model.get_output_embeddings()
    for name, weight in BLENDS[number].active.items():
        for path, factors in made.adapters[name].modules.items():
            module = model.get_submodule(path)
            delta = weight * factors.b.double() @ factors.a.double()
            if module.weight is getattr(head, "weight", None):  # the adapter is of the embedding, not of the tied head
                head.weight = nn.Parameter(head.weight.detach().clone())
            whole = module.weight.double() + (delta.T if factors.embedding or isinstance(module, Conv1D) else delta)
            module.weight.data = whole.float()
    return model


def check(made: Made, loaded: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, tiny.VOCABULARY, (n + DECODED + 1,), generator=generator).tolist() for n in LENGTHS]
    ours = logits(loaded, texts)
    base: Any = AutoModelForCausalLM.from_pretrained(made.folder / "base").eval()
    for number, length in enumerate(LENGTHS):
        model = merged(base, made, number)
        for end in (length, length + DECODED):
            asked = {"input_ids": torch.tensor([texts[number][:end]]), "use_cache": False}
            with torch.inference_mode():
                theirs = model(**asked).logits[0, -1]
                plain = base(**asked).logits[0, -1]
            assert theirs.isfinite().all()
            assert (ours[number, end] - theirs).abs().max() / theirs.abs().max() < 1e-5
            assert number == 0 or (theirs - plain).abs().max() / theirs.abs().max() > 1e-3, "the adapters do something"


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - UNMADE.keys()))
def test_an_architecture_is_served_exactly_or_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    model = made(tiny_config(kind), tmp_path, UNFIT.get(kind))
    outcome = SERVED
    try:
        loaded = model.load()
    except (LoadError, AdapterError) as error:
        outcome = str(error)
    if outcome == SERVED:
        check(model, loaded)
        kept = sum(shape.token_bytes for shape in loaded.forward.layers)
        assert kind in OTHER_HEADS or kv_bytes_per_token(loaded.model.config, torch.float32) == kept
    assert OUTCOMES.get(kind, outcome) in outcome  # a kind that a newer transformers brings is in no table


def test_the_table_and_what_cannot_be_made_are_all_kinds() -> None:
    assert sum(len(kinds.split()) for kinds in TABLE.values()) == len(OUTCOMES), "each is there once"
    assert OUTCOMES.keys() | UNMADE.keys() == KINDS.keys()


@pytest.mark.parametrize("which", LLAMAS)
def test_what_looks_like_a_llama_is_served_exactly(which: str, tmp_path: Path) -> None:
    model = made(LLAMAS[which], tmp_path)
    check(model, model.load())


def test_bert_as_a_decoder_is_served_exactly(tmp_path: Path) -> None:
    config = tiny_config("bert")
    config.is_decoder = True
    model = made(config, tmp_path)
    check(model, model.load())


def test_positions_that_do_not_count_from_0_are_refused(tmp_path: Path) -> None:
    """RoBERTa's begin behind its padding."""
    config = tiny_config("roberta")
    config.is_decoder = True
    with pytest.raises(LoadError, match="computes a token from more than its own position"):
        made(config, tmp_path).load()


def test_a_llama_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES)
    config.is_causal = False
    with pytest.raises(LoadError, match="lets tokens attend to later ones in layer 0"):
        made(config, tmp_path).load()


@pytest.mark.parametrize("kind", UNFIT)
def test_an_adapter_that_the_code_would_pass_by_is_refused(kind: str, tmp_path: Path) -> None:
    """transformers' code only reads the weight of such a module, or expects more of it than one tensor."""
    with pytest.raises(
        AdapterError, match=rf"adapter 'alpaca': it acts on \S*{UNFIT[kind]}, where the embedded engine"
    ):
        made(tiny_config(kind), tmp_path).load()
