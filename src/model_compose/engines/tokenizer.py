"""Loads the base's tokenizer with its chat template, from a folder or from a GGUF file."""

import tempfile
from pathlib import Path
from typing import Any

from model_compose.engines.on_disk import check_chat_template, gguf_header, template_beside
from model_compose.errors import LoadError
from model_compose.headers import Gguf
from model_compose.sources import Fetched


def load_tokenizer(base: Fetched, trust_remote_code: bool, *, chat: bool = False) -> Any:
    """transformers' fast tokenizer, from a folder, or from a GGUF file and the files beside it.

    chat: whether it must have a chat template. Raises LoadError if it has none, or if the tokenizer is a slow one.
    """
    from transformers import AutoTokenizer

    header = None if base.file is None else gguf_header(base.folder / base.file)
    if chat:
        check_chat_template(base, header)
    if header is not None:
        return _gguf_tokenizer(base, header)
    tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=trust_remote_code, local_files_only=True)
    if not tokenizer.is_fast:
        raise LoadError(
            f"{base.folder} has only a slow tokenizer, which cannot be used for streaming; add a tokenizer.json "
            "(transformers: AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...))"
        )
    return tokenizer


def _gguf_tokenizer(base: Fetched, header: Gguf) -> Any:
    """The tokenizer of a GGUF file. A tokenizer.json beside the file is preferred if it has the same tokens, since it loads
    faster and needs no conversion. A chat template beside the file is preferred to the one inside."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokens = header.strings("tokenizer.ggml.tokens")
    tokenizer: Any = None
    if (base.folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base.folder, local_files_only=True)
    if tokenizer is not None and _same_tokens(tokenizer, tokens):
        for role in ("bos", "eos"):  # a tokenizer.json does not say which tokens these are
            id = header.fields.get(f"tokenizer.ggml.{role}_token_id")
            if isinstance(id, int) and getattr(tokenizer, f"{role}_token_id") is None:
                setattr(tokenizer, f"{role}_token", tokens[id])
    else:
        # Link the file into an empty folder: transformers would prefer a tokenizer.json beside the file.
        with tempfile.TemporaryDirectory(prefix="model-compose-") as alone:
            name = header.path.name
            (Path(alone) / name).symlink_to(header.path.absolute())
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=name, local_files_only=True)
    tokenizer.chat_template = template_beside(base.folder) or header.chat_template
    return tokenizer


def _same_tokens(tokenizer: Any, tokens: list[str]) -> bool:
    """Whether the tokenizer has the GGUF file's tokens. Added tokens are not compared, since converters rewrite them."""
    own, added = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), tokenizer.added_tokens_decoder
    return all(id in added or tokens[id : id + 1] == [token] for id, token in enumerate(own))
