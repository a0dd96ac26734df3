"""Tiny real models on disk: a byte-level tokenizer, random bases of several families, adapters written by peft."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role') }}{% endif %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BOS, EOS = 0, 1
VOCABULARY = 258
"""Two special tokens and one for each byte."""


def tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, so that most characters beyond ASCII span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": BOS, "</s>": EOS} | {char: index + 2 for index, char in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
        "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaConfig(**(sizes | changes))


def save_base(folder: Path, config: PreTrainedConfig | None = None, *, chat: bool = True, seed: int = 0) -> Path:
    """A random causal LM with its tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or llama_config())
    model.save_pretrained(folder)
    tokenizer(chat=chat).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, *, seed: int = 1, std: float = 0.05, **options: Any) -> Path:
    """A random LoRA adapter, saved by PEFT. `options` are those of LoraConfig."""
    torch.manual_seed(seed)
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)
    model.save_pretrained(folder)
    return folder


YAML = """\
controller:
  adapter: {type: http-server, port: 0, base_path: /api}
workflow:
  title: Tiny
  job:
    input: ${input}
    output: {generated: "${output}"}
component:
  type: model
  task: text-generation
  model: ./base
  precision: float32
  peft_adapters:
    - {type: lora, name: alpaca, model: ./alpaca, weight: 0.7}
    - {type: lora, name: pirate, model: ./pirate, weight: 0.8}
  blends:
    strong: {alpaca: 2.0}
    plain: {}
  action:
    text: ${input.prompt as text}
    blend: ${input.blend}
    max_output_length: 12
    params: {do_sample: false}
"""


def save_project(folder: Path, yaml: str = YAML, config: PreTrainedConfig | None = None) -> Path:
    """Write a project like a user's: a base, two adapters with different targets, and the YAML. Returns the YAML's path."""
    base = save_base(folder / "base", config)
    save_adapter(folder / "alpaca", base, seed=1, std=0.5)
    save_adapter(folder / "pirate", base, seed=2, std=0.5, r=2, lora_alpha=4, target_modules=["o_proj", "down_proj"])
    path = folder / "model-compose.yml"
    path.write_text(yaml, encoding="utf-8")
    return path


def teach_to_say(base: Path, cycle: str) -> None:
    """Change a base's weights so that greedy decoding repeats `cycle` byte by byte. The bytes of `cycle` must all differ.

    All layers' weights become 0, the embedding becomes one-hot, and the head maps each byte to the next.
    """
    tokens = tokenizer()(cycle)["input_ids"]
    assert len(set(tokens)) == len(tokens)
    model = AutoModelForCausalLM.from_pretrained(base)
    state = model.state_dict()
    for name, tensor in state.items():
        tensor.fill_(1.0 if "norm" in name else 0.0)
    for position, (token, following) in enumerate(zip(tokens, tokens[1:] + tokens[:1], strict=True)):
        state["model.embed_tokens.weight"][token, position] = 1.0
        state["lm_head.weight"][following, position] = 1.0
    model.load_state_dict(state)
    model.save_pretrained(base)
