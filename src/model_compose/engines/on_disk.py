"""Checks a base's files before anything is loaded: their kind, whether they are complete, and whether they have a tokenizer
and a chat template. Reads only configs and headers, in milliseconds and without torch, so that `validate` can use it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model_compose.errors import LoadError
from model_compose.headers import Gguf, HeaderError, Stored, read_gguf, read_safetensors
from model_compose.sources import Fetched

_PART = re.compile(r"(.+-)(\d{5})-of-(\d{5})\.gguf")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The files of weights, in the order in which transformers looks for them. Each comes before its index of shards."""
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
    if driver == "huggingface" and (part := _PART.fullmatch(base.file)) and int(part[3]) > 1:
        raise LoadError(
            f"{base.file} is one of several parts, but transformers reads only one file; join the parts "
            "(llama-gguf-split --merge), or use driver: llamacpp"
        )


def gguf_parts(file: Path) -> list[Path]:
    """All files of a split GGUF base. Raises LoadError if `file` is not the first part, or if a part is missing."""
    if (match := _PART.fullmatch(file.name)) is None:
        return [file]
    start, number, count = match.groups()
    if int(number) != 1:
        raise LoadError(f"{file} is a later part of a base; point to its first part, {start}00001-of-{count}.gguf")
    files = [file.with_name(f"{start}{part:05}-of-{count}.gguf") for part in range(1, int(count) + 1)]
    if missing := [each.name for each in files if not each.exists()]:
        raise LoadError(
            f"{file} is the first of {int(count)} parts, but there is no {missing[0]} beside it; download it too"
        )
    return files


def gguf_header(file: Path) -> Gguf:
    """The header of a GGUF file. Raises LoadError for a file that is not GGUF, or that is incomplete."""
    with _reading(file):
        return read_gguf(file)


def read_config(base: Fetched) -> Mapping[str, Any]:
    """The config.json of the base's folder. Raises LoadError if it is missing or not valid."""
    if (base.folder / "config.json").is_file():
        return _json(base.folder / "config.json")
    if (base.folder / "adapter_config.json").is_file():
        raise LoadError(f"{base} is an adapter, not a base model; list it under peft_adapters")
    raise LoadError(f"{base.folder} has no config.json; is it the folder of a model that transformers has saved?")


def has_weights(base: Fetched) -> bool:
    """Whether the base's folder holds weights, or an index of shards."""
    return any((base.folder / f"{name}{ending}").is_file() for name in _WEIGHTS for ending in ("", ".index.json"))


def read_weights(base: Fetched) -> dict[str, Stored] | None:
    """The headers' entries of a folder's checkpoint, over all of its files; None for pickles, which have no header.

    Raises LoadError for weights that are missing or damaged.
    """
    for name in _WEIGHTS:
        if (base.folder / name).is_file():
            return _tensors([base.folder / name])
        index = base.folder / f"{name}.index.json"
        if index.is_file():
            listed = _json(index).get("weight_map")
            if not isinstance(listed, dict):
                raise LoadError(f"{index} lists no files (weight_map); download it again")
            shards = sorted({base.folder / str(shard) for shard in listed.values()})
            with _reading(index):  # a listed name may be too long for any file
                missing = [shard.name for shard in shards if not shard.is_file()]
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise LoadError(f"{base.folder} has no {missing[0]}{more}, which {index.name} lists; download it too")
            return _tensors(shards)
    raise LoadError(f"{base.folder} has a config but no weights ({' or '.join(_WEIGHTS)}); download them too")


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
    found = _json(path).get("chat_template") if path.is_file() else None
    with _reading(path):
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


def _tensors(files: list[Path]) -> dict[str, Stored] | None:
    tensors: dict[str, Stored] = {}
    for file in files:
        if file.suffix != ".safetensors":
            return None
        with _reading(file):
            tensors |= read_safetensors(file)
    return tensors


def _json(path: Path) -> Mapping[str, Any]:
    """A file's JSON object. Raises LoadError if it holds anything else."""
    with _reading(path):
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise HeaderError(f"is not valid JSON ({error}); download it again") from None
        if not isinstance(found, dict):
            raise HeaderError("does not hold a JSON object; download it again")
        return found


def _text(path: Path) -> str:
    """A file's text. Raises LoadError if it is not UTF-8."""
    with _reading(path):
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise HeaderError(f"is not UTF-8 text ({error.reason} at byte {error.start}); download it again") from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A context in which HeaderError and OSError become a LoadError that names the file."""
    try:
        yield
    except HeaderError as error:
        raise LoadError(f"{path} {error}") from None
    except OSError as error:
        raise LoadError(f"{path} cannot be read ({error.strerror})") from None
