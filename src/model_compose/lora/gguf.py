"""Writes a LoraAdapter as a GGUF LoRA file, which llama.cpp loads (llama-server --lora, llama_adapter_lora_init).

The gguf package maps the names of the tensors. For some architectures the order of rows differs too. Checkpoints of
transformers are made for RoPE that rotates the two halves of a head; llama.cpp's "norm" RoPE rotates neighbouring pairs, so
its converter reorders the rows of q and k. The rows of B must then be reordered alike. The lists below say which
architectures need that; each was checked against llama.cpp's own converter. All other architectures are refused by name.
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
"""Architectures for which llama.cpp's converter reorders the rows of q and k (conversion/llama.py, permute)."""

PLAIN = frozenset(["qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "starcoder2", "gpt2"])
"""Architectures whose matrices have the same row order in GGUF as in transformers."""

MODEL_TYPES = {
    "llama": "llama", "mistral": "llama", "granite": "granite", "smollm3": "smollm3", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "olmo2": "olmo2",
    "starcoder2": "starcoder2", "gpt2": "gpt2",
}  # fmt: skip
"""transformers' model_type -> GGUF's general.architecture."""

ADAPTED = frozenset(
    ["ATTN_Q", "ATTN_K", "ATTN_V", "ATTN_QKV", "ATTN_OUT", "FFN_GATE", "FFN_UP", "FFN_DOWN", "OUTPUT", "TOKEN_EMBD"]
)
"""The tensors to which llama.cpp applies adapters (build_lora_mm, build_inp_embd). It ignores factors for any other."""


@dataclass(frozen=True)
class Architecture:
    """The properties of a base that decide how an adapter's factors are named and ordered in GGUF.

    name: GGUF's general.architecture, one of PERMUTED or PLAIN. tied: whether the output head uses the embedding's tensor.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool

    @classmethod
    def of_config(cls, config: Any) -> Self:
        """From a transformers config. Raises AdapterError for an architecture in neither list."""
        config = config.get_text_config()
        name = checked_name(MODEL_TYPES.get(config.model_type, config.model_type))
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        return cls(name, int(config.num_hidden_layers), heads, kv_heads, bool(config.tie_word_embeddings))

    def tensor(self, path: str) -> tuple[str, str] | None:
        """The kind (a name in ADAPTED) and the GGUF weight name of the module at `path` in transformers.

        None for a module that llama.cpp does not have or cannot adapt.
        """
        found = self._find(path)
        return None if found is None else found[1:]

    def _find(self, path: str) -> tuple[str, str, str] | None:
        """The module's path in its canonical spelling, then what `tensor` returns. Prefixes such as language_model. do not
        matter."""
        inner = text_path(path)
        for own in (f"model.{inner}", inner):
            found = self._names.get_type_and_name(own)
            if found and found[0].name in ADAPTED:
                return own, found[0].name, f"{found[1]}.weight"
        return None

    @cached_property
    def _names(self) -> Any:
        """gguf's map of tensor names. Building it takes milliseconds, hence the cache."""
        import gguf

        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        return gguf.get_tensor_name_map(arch, self.layers)

    def shapes(self, paths: Iterable[str], matrices: Mapping[str, tuple[int, ...]]) -> dict[str, ModuleShape]:
        """The base's modules at `paths` (as transformers names them), without paths where the base has no module.

        The keys are canonical paths, so that two spellings of one module become one key. matrices: the dimensions of the
        base's matrices by GGUF name; GGUF counts dimensions from the innermost.
        """
        shapes = {}
        for path, kind, name in filter(None, map(self._find, paths)):
            # A tied output head has no tensor of its own; it uses the embedding's.
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
    """Write the adapter in float32, with B multiplied by the scaling, so that llama.cpp at weight 1 adds exactly s B A.

    adapter.lora.alpha is written as 0, for which llama.cpp scales by the weight alone (llama-adapter.h, get_scale). Its
    usual factor alpha / r would be wrong for adapters whose rank differs between modules. The file gets its name `path`
    only after it is complete.

    Raises AdapterError for an architecture or a module that cannot be converted exactly.
    """
    import gguf

    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, values in _tensors(adapter, base):
        if name in tensors:
            raise AdapterError(
                f"adapter '{adapter.name}': two of its modules have the same tensor in GGUF, {name.rpartition('.')[0]}"
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
    """The factors by GGUF name, as numpy arrays with rows first. (GGUF itself counts dimensions from the innermost.)"""
    for path, factors in adapter.modules.items():
        found = base.tensor(path)
        if found is None:
            raise AdapterError(
                f"adapter '{adapter.name}': llama.cpp takes no adapter on '{path}' of a {base.name} model; use the "
                "huggingface driver"
            )
        kind, name = found
        if base.tied and kind in ("OUTPUT", "TOKEN_EMBD"):
            raise AdapterError(
                f"adapter '{adapter.name}': it adapts {path}, but this base has one tensor for its embedding and its "
                "output head, and llama.cpp cannot adapt only one of the two; use the huggingface driver"
            )
        a, b = factors.a.float(), scaled_b(factors, kind, base)
        yield f"{name}.lora_a", (a.T if factors.embedding else a).contiguous().numpy()
        yield f"{name}.lora_b", b.contiguous().numpy()


def scaled_b(factors: "Factors", kind: str, base: Architecture) -> "torch.Tensor":
    """s · B, (out, r), in float32, with its rows in the order of the base's GGUF file."""
    b = factors.b.float() * factors.scaling
    if base.name not in PERMUTED or kind not in ("ATTN_Q", "ATTN_K"):
        return b
    heads = base.heads if kind == "ATTN_Q" else base.kv_heads
    return permute(b, heads)


def permute(rows: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Reorder rows so that row i of a head's first half and row i of its second half become neighbours.

    rows: (heads · size, …), where size, the rows of one head, is even.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def is_stored(copy: "torch.Tensor", stored: Any) -> bool | None:
    """Whether `copy` equals a matrix of the base's GGUF file (a gguf.ReaderTensor), after rounding to that file's dtype.

    None if gguf cannot quantise to that dtype, so that the two cannot be compared.
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
    """Return `architecture`. Raises AdapterError if it is neither in PERMUTED nor in PLAIN."""
    if architecture not in PERMUTED | PLAIN:
        raise AdapterError(
            f"adapters for the architecture {architecture} cannot be converted to GGUF, since model-compose does not know "
            f"the order of its rows there; known: {', '.join(sorted(PERMUTED | PLAIN))}"
        )
    return architecture
