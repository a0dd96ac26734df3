"""A tiny GGUF base, written from a checkpoint folder of tests/tiny.py as llama.cpp's converter would write it."""

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny

VOCABULARY = tiny.VOCABULARY + 1
"""GGUF cannot say "no merges", so that there is one: of two control characters."""


FLOAT32 = gguf.GGMLQuantizationType.F32


def save_gguf(
    folder: Path, file: Path, *, permuted: bool = True, kind: gguf.GGMLQuantizationType = FLOAT32, split: int = 0
) -> Path:
    """The model of `folder`. permuted: the rows of q and k in llama.cpp's order, as for a Llama. kind: of its matrices.
    split: so many tensors a file, named file-00001-of-0000N.gguf; 0 is one file."""
    config: Any = AutoConfig.from_pretrained(folder)
    name = {"llama": "llama", "qwen2": "qwen2"}[config.model_type]
    writer = gguf.GGUFWriter(file, name, split_max_tensors=split)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    _add_tokenizer(writer, folder)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if permuted else {}
    for key, tensor in AutoModelForCausalLM.from_pretrained(folder).float().state_dict().items():
        module, _, ending = key.rpartition(".")
        if len(tensor) == tiny.VOCABULARY:
            tensor = torch.cat([tensor, torch.zeros(1, tensor.shape[1])])  # of the merge's token
        if (count := heads.get(module.rpartition(".")[2])) is not None:
            tensor = pairs_for_halves(tensor, count)
        stored = kind if tensor.ndim == 2 else FLOAT32
        values = gguf.quantize(tensor.contiguous().numpy(), stored)
        writer.add_tensor(f"{names.get_name(module)}.{ending}", values, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def pairs_for_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: the new row 2i of a head is its old row i, the new row 2i + 1 its old row i + half."""
    size = len(tensor) // heads
    order = [head * size + part * (size // 2) + i for head in range(heads) for i in range(size // 2) for part in (0, 1)]
    return tensor[order]


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    made = tiny.tokenizer()
    by_id = sorted(made.get_vocab(), key=made.get_vocab().__getitem__)
    first, second = by_id[2:4]
    merged = [token for token in by_id if token not in ("<s>", "</s>") and ord(token) > 0xFF][:2] or [first, second]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*by_id, "".join(merged)])
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (VOCABULARY - 2))
    writer.add_token_merges([" ".join(merged)])
    writer.add_bos_token_id(tiny.BOS)
    writer.add_eos_token_id(tiny.EOS)
    writer.add_add_bos_token(False)
    if (folder / "chat_template.jinja").exists():
        writer.add_chat_template(tiny.CHAT_TEMPLATE)
