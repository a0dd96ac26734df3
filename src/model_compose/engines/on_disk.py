"""Checks a base's files before anything is loaded: their kind, whether they are complete, and whether they have a tokenizer
and a chat template. Reads only configs and headers, in milliseconds and without torch, so that `validate` can use it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_compose.checkpoint.files import NAMES, file_errors, read_json, weight_files
from model_compose.errors import LoadError
from model_compose.headers import Gguf, HeaderError, Stored, read_gguf, read_safetensors
from model_compose.sources import Fetched
from model_compose.sources.choice import gguf_part

_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model", "tekken.json",
    "*.tiktoken",
)  # fmt: skip
CONFIG_FILES = ("*.json", "*.jinja")
"""The small files that describe a base or an adapter, without weights."""
NO_CHAT_TEMPLATE = "the base model has no chat template; use /v1/completions or task: text-generation"


def check_kind(base: Fetched, driver: str) -> None:
    """Check that the driver can load such files (one GGUF file, or a checkpoint's folder). Raises LoadError."""
    if base.file is None:
        if driver == "llamacpp":
            raise LoadError(
                f"{base} is a folder without a GGUF file, which driver: llamacpp needs; use driver: huggingface"
            )
        return
    if driver == "vllm":
        raise LoadError(
            f"{base} is a single file, but vllm takes a folder of safetensors; for GGUF use driver: llamacpp"
        )
    if not base.file.endswith(".gguf"):
        raise LoadError(f"{base.file} is not a GGUF file; leave 'filename' out to load a checkpoint folder")
    if driver == "huggingface" and (part := gguf_part(base.file)) and part.count > 1:
        raise LoadError(
            f"{base.file} is one of several parts, but transformers reads only one file; join the parts "
            "(llama-gguf-split --merge), or use driver: llamacpp"
        )


def gguf_parts(file: Path) -> list[Path]:
    """All files of a split GGUF base. Raises LoadError if `file` is not the first part, or if a part is missing."""
    if (part := gguf_part(file.name)) is None:
        return [file]
    if part.number != 1:
        raise LoadError(f"{file} is a later part of a base; point to its first part, {part.name(1)}")
    files = [file.with_name(name) for name in part.names]
    if missing := [each.name for each in files if not each.exists()]:
        raise LoadError(
            f"{file} is the first of {part.count} parts, but there is no {missing[0]} beside it; download it too"
        )
    return files


def gguf_header(file: Path) -> Gguf:
    """The header of a GGUF file. Raises LoadError for a file that is not GGUF, or that is incomplete."""
    with file_errors(file):
        return read_gguf(file)


def read_config(base: Fetched) -> Mapping[str, Any]:
    """The config.json of the base's folder. Raises LoadError if it is missing or not valid."""
    if (base.folder / "config.json").is_file():
        return read_json(base.folder / "config.json")
    if (base.folder / "adapter_config.json").is_file():
        raise LoadError(f"{base} is an adapter, not a base model; list it under peft_adapters")
    raise LoadError(f"{base.folder} has no config.json; is it the folder of a model that transformers has saved?")


def read_weights(base: Fetched) -> dict[str, Stored] | None:
    """The headers' entries of a folder's checkpoint, over all of its files; None for pickles, which have no header.

    Raises LoadError for weights that are missing or damaged.
    """
    files = weight_files(base.folder)
    if not files:
        raise LoadError(f"{base.folder} has a config but no weights ({' or '.join(NAMES)}); download them too")
    tensors: dict[str, Stored] = {}
    for file in files:
        if file.suffix != ".safetensors":
            return None
        with file_errors(file):
            tensors |= read_safetensors(file)
    return tensors


def check_tokenizer(base: Fetched) -> None:
    """Raise LoadError if the base's folder has no tokenizer."""
    if not has_tokenizer(base):
        raise LoadError(f"{base.folder} has no tokenizer ({_TOKENIZERS[0]}); copy it from the model's repository")


def has_tokenizer(base: Fetched) -> bool:
    """Whether the base's folder has any file of a tokenizer."""
    return any(path.is_file() for pattern in _TOKENIZERS for path in base.folder.glob(pattern))


def check_chat_template(base: Fetched, header: Gguf | None = None) -> None:
    """Raise LoadError for a base without a chat template. header: the header of the base's GGUF file, if it is one."""
    if not (template_beside(base.folder) or (header and header.chat_template)):
        raise LoadError(
            f"{base} has no chat template, which task: chat-completion needs; put its chat_template.jinja beside "
            "its other files, or use task: text-generation"
        )


def template_beside(folder: Path) -> str | dict[str, str] | None:
    """The chat template in a folder, or several by name, found as transformers does. None if there is none.

    Raises LoadError for files that are not valid.
    """
    own = folder / "chat_template.jinja"
    named = {path.stem: _text(path) for path in folder.glob("additional_chat_templates/*.jinja")}
    if own.is_file():
        text = _text(own)
        return {"default": text, **named} if named else text
    path = folder / "tokenizer_config.json"
    found = read_json(path).get("chat_template") if path.is_file() else None
    with file_errors(path):
        return _templates(found) or named or None


def _templates(found: Any) -> str | dict[str, str] | None:
    """Check the value of a tokenizer_config.json's chat_template: a template, or several by name. Raises HeaderError."""
    if isinstance(found, list):  # an older form, from before templates had files of their own
        if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in found):
            raise HeaderError(
                "has a list as its chat_template whose entries are not {name, template}; download it again"
            )
        found = {each["name"]: each.get("template") for each in found}
    texts = found.values() if isinstance(found, dict) else () if found is None else (found,)
    if not all(isinstance(text, str) for text in texts):
        raise HeaderError("has a chat_template that is not text; download it again")
    templates: str | dict[str, str] | None = found
    return templates


def _text(path: Path) -> str:
    """A file's text. Raises LoadError if it is not UTF-8."""
    with file_errors(path):
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise HeaderError(f"is not UTF-8 text ({error.reason} at byte {error.start}); download it again") from None
