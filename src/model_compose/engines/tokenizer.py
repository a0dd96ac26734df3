"""The base's own tokenizer with its chat template, from a folder or from inside a GGUF file."""

import tempfile
from pathlib import Path
from typing import Any

from model_compose.engines.on_disk import check_chat_template, gguf_header, template_beside
from model_compose.errors import LoadError
from model_compose.headers import Gguf
from model_compose.sources import Fetched


def load_tokenizer(base: Fetched, trust_remote_code: bool, *, chat: bool = False) -> Any:
    """transformers' fast tokenizer, from a folder, or from inside a GGUF file and what lies beside it.

    chat: whether it must have a chat template. Raises LoadError.
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
            f"{base.folder} has only a slow tokenizer, which cannot stream; add a tokenizer.json (transformers: "
            "AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...))"
        )
    return tokenizer


def _gguf_tokenizer(base: Fetched, header: Gguf) -> Any:
    """The tokenizer.json beside a GGUF file where it has the file's own tokens: it is read faster and was not converted.
    Else the one inside. A chat template beside the file goes before the one inside."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokens = header.strings("tokenizer.ggml.tokens")
    tokenizer: Any = None
    if (base.folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base.folder, local_files_only=True)
    if tokenizer is not None and _same_tokens(tokenizer, tokens):
        for role in ("bos", "eos"):  # without a tokenizer_config.json nothing else says which they are
            id = header.fields.get(f"tokenizer.ggml.{role}_token_id")
            if isinstance(id, int) and getattr(tokenizer, f"{role}_token_id") is None:
                setattr(tokenizer, f"{role}_token", tokens[id])
    else:
        with tempfile.TemporaryDirectory(
            prefix="model-compose-"
        ) as alone:  # transformers prefers a tokenizer.json beside
            name = header.path.name
            (Path(alone) / name).symlink_to(header.path.absolute())
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=name, local_files_only=True)
    tokenizer.chat_template = template_beside(base.folder) or header.chat_template
    return tokenizer


def _same_tokens(tokenizer: Any, tokens: list[str]) -> bool:
    """Whether a tokenizer has a GGUF file's tokens. Converters rewrite those that were added to a vocabulary."""
    own, added = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), tokenizer.added_tokens_decoder
    return all(id in added or tokens[id : id + 1] == [token] for id, token in enumerate(own))
