"""A LoraAdapter -> a GGUF LoRA file, which llama.cpp loads (llama-server --lora, llama_adapter_lora_init).

Names come from the gguf package's map. Names alone do not do: where llama.cpp rotates neighbouring pairs (its "norm" RoPE)
and the checkpoint halves of a head, its converter moved the rows of q and k, and so must B's rows move. Which
architectures do is listed here, each tried against llama.cpp's own converter; all others are refused by name.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from model_compose.errors import AdapterError
from model_compose.lora.adapter import ModuleShape, is_copy, text_path

if TYPE_CHECKING:
    import numpy as np
    import torch

    from model_compose.lora.adapter import Factors, LoraAdapter

PERMUTED = frozenset(["llama", "granite", "smollm3"])
"""Architectures whose q and k have their rows in another order than in transformers (conversion/llama.py, permute)."""

PLAIN = frozenset(["qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "starcoder2", "gpt2"])
"""Architectures whose products are as in transformers."""

MODEL_TYPES = {
    "llama": "llama", "mistral": "llama", "granite": "granite", "smollm3": "smollm3", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "olmo2": "olmo2",
    "starcoder2": "starcoder2", "gpt2": "gpt2",
}  # fmt: skip
"""transformers' model_type -> GGUF's general.architecture."""

ADAPTED = frozenset(
    ["ATTN_Q", "ATTN_K", "ATTN_V", "ATTN_QKV", "ATTN_OUT", "FFN_GATE", "FFN_UP", "FFN_DOWN", "OUTPUT", "TOKEN_EMBD"]
)
"""Tensors that llama.cpp multiplies by way of its adapters (build_lora_mm, build_inp_embd); it would ignore others."""


@dataclass(frozen=True)
class Architecture:
    """What of a base decides where an adapter's factors go.

    name: GGUF's general.architecture, one of PERMUTED or PLAIN. tied: whether the output head is the embedding's tensor.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool

    @classmethod
    def of_config(cls, config: Any) -> Self:
        """From a transformers config. Raises AdapterError for one that this module does not know."""
        config = config.get_text_config()
        name = checked_name(MODEL_TYPES.get(config.model_type, config.model_type))
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        return cls(name, int(config.num_hidden_layers), heads, kv_heads, bool(config.tie_word_embeddings))

    def tensor(self, path: str) -> tuple[str, str] | None:
        """A module's path in transformers -> its kind (a name in ADAPTED) and the name of its weight in GGUF.

        None for what llama.cpp has not got, or cannot adapt.
        """
        found = self._find(path)
        return None if found is None else found[1:]

    def _find(self, path: str) -> tuple[str, str, str] | None:
        """As `tensor`, after the path's one spelling here, whatever stood before the text decoder's own part."""
        inner = text_path(path)
        for own in (f"model.{inner}", inner):
            found = self._names.get_type_and_name(own)
            if found and found[0].name in ADAPTED:
                return own, found[0].name, f"{found[1]}.weight"
        return None

    @cached_property
    def _names(self) -> Any:
        """gguf's map, which takes milliseconds to make."""
        import gguf

        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        return gguf.get_tensor_name_map(arch, self.layers)

    def shapes(self, paths: Iterable[str], matrices: Mapping[str, tuple[int, ...]]) -> dict[str, ModuleShape]:
        """What a base of this architecture has at modules' paths in transformers, each by one spelling of its path, so
        that two spellings of a module are seen to be one. Without those where it has nothing.

        matrices: its matrices' dimensions by GGUF name, from the innermost.
        """
        shapes = {}
        for path, kind, name in filter(None, map(self._find, paths)):
            # The head has a tensor of its own only where it is not the embedding's.
            own = "token_embd.weight" if kind == "OUTPUT" and self.tied else name
            if own in matrices:
                inputs, outputs = matrices[own]
                # An embedding's matrix has a row for each token.
                shapes[path] = (
                    ModuleShape("embedding", outputs, inputs)
                    if kind == "TOKEN_EMBD"
                    else ModuleShape("linear", inputs, outputs)
                )
        return shapes


def write_gguf(adapter: "LoraAdapter", base: Architecture, path: Path) -> None:
    """Writes the adapter in float32, its scalings folded into B, so that at weight 1 llama.cpp adds Σ s B A itself.

    The file stands under `path` only once it is whole. adapter.lora.alpha is 0, by which llama.cpp takes the weight alone
    as its scale (llama-adapter.h, get_scale): alpha / r would be wrong where ranks differ between modules.

    Raises AdapterError for an architecture or a module that cannot be converted exactly.
    """
    import gguf

    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, values in _tensors(adapter, base):
        if name in tensors:
            raise AdapterError(
                f"adapter '{adapter.name}': two of its modules are one, {name.rpartition('.')[0]}, in GGUF"
            )
        tensors[name] = values
    partial = path.with_name(f".{path.name}.partial")
    writer = gguf.GGUFWriter(partial, base.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(adapter.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _tensors(adapter: "LoraAdapter", base: Architecture) -> "Iterator[tuple[str, np.ndarray[Any, Any]]]":
    """GGUF names with factors as numpy has them: rows first. GGUF itself counts dimensions from the innermost."""
    for path, factors in adapter.modules.items():
        found = base.tensor(path)
        if found is None:
            raise AdapterError(
                f"adapter '{adapter.name}': llama.cpp takes no adapter on '{path}' of a {base.name} model; the huggingface "
                "driver does"
            )
        kind, name = found
        if base.tied and kind in ("OUTPUT", "TOKEN_EMBD"):
            raise AdapterError(
                f"adapter '{adapter.name}': {path} is adapted, and this base has one tensor for its embedding and its "
                "output head, which llama.cpp cannot adapt apart; use the huggingface driver"
            )
        a, b = factors.a.float(), scaled_b(factors, kind, base)
        yield f"{name}.lora_a", (a.T if factors.embedding else a).contiguous().numpy()
        yield f"{name}.lora_b", b.contiguous().numpy()


def scaled_b(factors: "Factors", kind: str, base: Architecture) -> "torch.Tensor":
    """s · B, float32, with its rows where the base has them; (out, r)."""
    b = factors.b.float() * factors.scaling
    if base.name not in PERMUTED or kind not in ("ATTN_Q", "ATTN_K"):
        return b
    heads = base.heads if kind == "ATTN_Q" else base.kv_heads
    return permute(b, heads)


def permute(rows: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Row i of a head's first half and row i of its second become neighbours. (heads · size, …), size even."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def is_stored(copy: "torch.Tensor", stored: Any) -> bool | None:
    """Whether a base's matrix in GGUF (gguf.ReaderTensor) is `copy`: either becomes the other in the other's dtype.

    None where gguf cannot quantise to the matrix's type.
    """
    import gguf
    import torch

    if tuple(map(int, stored.shape)) != tuple(copy.shape)[::-1]:
        return False
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(stored.tensor_type.name)
    if plain is not None:
        weights = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        return is_copy(copy, weights.reshape(copy.shape).to(plain))
    try:
        quantized = gguf.quantize(copy.float().numpy(), stored.tensor_type)
    except NotImplementedError:
        return None
    return bool((quantized.reshape(stored.data.shape) == stored.data).all())


def checked_name(architecture: str) -> str:
    """The name itself. Raises AdapterError for an architecture that is in neither list."""
    if architecture not in PERMUTED | PLAIN:
        raise AdapterError(
            f"adapters for the architecture {architecture} cannot be converted to GGUF, as the order of its rows there is "
            f"not known; known: {', '.join(sorted(PERMUTED | PLAIN))}"
        )
    return architecture
