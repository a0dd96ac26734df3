"""What every driver does alike: fetching adapters, the base's own tokenizer and chat template, and checks of a request."""

import re
import tempfile
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from model_compose.engines import AdapterOptions, ModelOptions
from model_compose.engines.on_disk import check_chat_template, gguf_header, template_beside
from model_compose.errors import AdapterError, InputError, LoadError, SourceError
from model_compose.generation import Message, Request
from model_compose.headers import Gguf
from model_compose.lora.adapter import WEIGHT_FILES, LoraAdapter, read_adapter
from model_compose.lora.blend import Blend
from model_compose.lora.peft_config import read_config
from model_compose.progress import Report
from model_compose.sources import Fetched, HuggingfaceSource, ModelSource, fetch

CONFIG_FILES = ("*.json", "*.jinja")


def refuse_common(options: ModelOptions) -> None:
    """Raises ValueError for what no driver can honour."""
    refused = {
        "fast_tokenizer": (not options.fast_tokenizer, "streaming needs the fast tokenizer; leave it out"),
        "preload": (not options.preload, "models load when the service starts; leave it out"),
        "on_demand": (bool(options.on_demand), "models stay loaded; leave it out"),
        "runtime_spec": (options.runtime_spec is not None, "it would have no effect; leave it out"),
    }
    for key, (given, remedy) in refused.items():
        if given:
            raise ValueError(f"driver {options.driver} cannot honour '{key}': {remedy}")


def refuse_full_rank(options: ModelOptions) -> None:
    """Raises ValueError for a blend that is no LoRA, where the driver has nothing but LoRAs."""
    if blends := options.to_blends().full_rank:
        raise ValueError(
            f"driver {options.driver} cannot honour the blend {blends[0].described}, which has full rank and is no LoRA: "
            "use driver: huggingface, or serve what `model-compose export --format merged` writes"
        )


_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def check_device(name: str) -> None:
    """Raises LoadError for what is no device's name; whether this machine has it is torch's to say."""
    if not _DEVICE.fullmatch(name):
        raise LoadError(f"device '{name}' is not known; use auto, cpu, cuda, cuda:0 or mps")


def check_quantization(kind: str | None, device: str) -> None:
    """Raises LoadError where a device of this name has no kernels for it."""
    from model_compose.engines.huggingface.sizes import KINDS

    device_type = device.partition(":")[0]
    kinds = KINDS.get(device_type, ())
    if kind is not None and kind not in kinds:
        use = f"on {device_type} use {' or '.join(kinds)}" if kinds else f"leave it out on {device_type}"
        raise LoadError(f"quantization: {kind} is not available on {device}; {use}")


def fetch_adapters(options: ModelOptions, base_dir: Path, report: Report) -> list[LoraAdapter]:
    """All adapters of the file. Blocking. Raises SourceError, AdapterError."""
    named = zip(options.adapter_names, options.peft_adapters, strict=True)
    return [fetch_adapter(name, adapter, base_dir, report) for name, adapter in named]


def fetch_adapter(name: str, options: AdapterOptions, base_dir: Path, report: Report) -> LoraAdapter:
    """Fetches and reads one adapter. Blocking. Raises SourceError, AdapterError."""
    folder = fetch_adapter_folder(name, options.model, base_dir, report)
    _check_memory(name, folder)
    return read_adapter(folder, name)


def _check_memory(name: str, folder: Path) -> None:
    """Raises AdapterError for weights that would not fit twice: as the file has them, and as tensors."""
    from model_compose.engines.huggingface.free import main_memory
    from model_compose.engines.huggingface.memory import size_text

    free = main_memory()
    needed = 2 * next((path.stat().st_size for file in WEIGHT_FILES if (path := folder / file).is_file()), 0)
    if free is not None and needed > free:
        raise AdapterError(
            f"adapter '{name}': reading its weights takes {size_text(needed)} of main memory, of which {size_text(free)} "
            "are free"
        )


def fetch_adapter_folder(name: str, source: ModelSource, base_dir: Path, report: Report) -> Path:
    """Fetches one adapter, after its config says that it can be used. Blocking. Raises SourceError, AdapterError."""
    if isinstance(source, HuggingfaceSource):
        # The config is small and decides whether the weights are worth fetching.
        only = fetch(source, base_dir=base_dir, only=CONFIG_FILES, report=report)
        read_config(only.folder, name)
    try:
        return fetch(source, base_dir=base_dir, report=report).folder
    except SourceError as error:
        raise SourceError(f"adapter '{name}': {error}") from error


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


def _same_tokens(tokenizer: Any, tokens: Sequence[str]) -> bool:
    """Whether a tokenizer has a GGUF file's tokens. Converters rewrite those that were added to a vocabulary."""
    own, added = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), tokenizer.added_tokens_decoder
    return all(id in added or tokens[id : id + 1] == [token] for id, token in enumerate(own))


def check_logit_bias(request: Request, vocabulary: int) -> None:
    """Raises InputError for a token that the model has not got."""
    check_tokens([token for token, _ in request.sampling.logit_bias], vocabulary)


def check_tokens(tokens: Iterable[int], vocabulary: int) -> None:
    """Raises InputError for one of a logit_bias that the model has not got."""
    for token in tokens:
        if token >= vocabulary:
            raise InputError(
                f"logit_bias names the token {token}, and this model has the tokens 0 to {vocabulary - 1}",
                field="logit_bias",
            )


def check_loaded(blend: Blend, adapters: Container[str]) -> None:
    """Raises InputError for an adapter that has been unloaded since the blend was resolved."""
    if gone := [name for name in blend.active if name not in adapters]:
        raise InputError(f"the adapter '{gone[0]}' has been unloaded meanwhile", field="blend")


def render_chat(tokenizer: Any, request: Request) -> str:
    """The messages as the base's chat template writes them. Raises InputError."""
    import jinja2

    if not tokenizer.chat_template:
        raise InputError(
            "the base model has no chat template; use /v1/completions or task: text-generation", field="messages"
        )
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise InputError(
            f"the base model has several chat templates and none of them is called default: "
            f"{', '.join(tokenizer.chat_template)}; call one of them so in the base's tokenizer_config.json, or use "
            "/v1/completions with the prompt written out",
            field="messages",
        )
    messages = [_turn(message) for message in request.prompt if not isinstance(message, str)]
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise InputError(f"the base's chat template refuses these messages: {error}", field="messages") from error
    except Exception as error:  # a template is a program, and may fail in any way
        raise InputError(
            f"the base's chat template fails on these messages: {type(error).__name__}: {error}; send others, or use "
            "/v1/completions with the prompt written out",
            field="messages",
        ) from error
    return text


def _turn(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content} | ({"name": message.name} if message.name else {})
