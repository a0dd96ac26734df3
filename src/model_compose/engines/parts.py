"""What every driver does alike: fetching adapters, the base's own tokenizer and chat template, and checks of a request."""

from collections.abc import Container
from pathlib import Path
from typing import Any

from model_compose.engines import AdapterOptions, ModelOptions
from model_compose.errors import InputError, LoadError, SourceError
from model_compose.generation import Message, Request
from model_compose.lora.adapter import LoraAdapter, read_adapter, read_config
from model_compose.lora.blend import Blend
from model_compose.progress import Report
from model_compose.sources import Fetched, HuggingfaceSource, ModelSource, fetch

CONFIG_FILES = ("*.json",)


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


def fetch_adapters(options: ModelOptions, base_dir: Path, report: Report) -> list[LoraAdapter]:
    """All adapters of the file. Blocking. Raises SourceError, AdapterError."""
    named = zip(options.adapter_names, options.peft_adapters, strict=True)
    return [fetch_adapter(name, adapter, base_dir, report) for name, adapter in named]


def fetch_adapter(name: str, options: AdapterOptions, base_dir: Path, report: Report) -> LoraAdapter:
    """Fetches and reads one adapter. Blocking. Raises SourceError, AdapterError."""
    return read_adapter(fetch_adapter_folder(name, options.model, base_dir, report), name)


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


def load_tokenizer(base: Fetched, trust_remote_code: bool) -> Any:
    """transformers' fast tokenizer, from a folder or from inside a GGUF file. Raises LoadError."""
    from transformers import AutoTokenizer

    gguf = {"gguf_file": base.file} if base.file and base.file.endswith(".gguf") else {}
    tokenizer = AutoTokenizer.from_pretrained(
        base.folder, trust_remote_code=trust_remote_code, local_files_only=True, **gguf
    )
    if not tokenizer.is_fast:
        raise LoadError(
            f"{base.folder} has only a slow tokenizer, which cannot stream; add a tokenizer.json (transformers: "
            "AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...))"
        )
    return tokenizer


def check_logit_bias(request: Request, vocabulary: int) -> None:
    """Raises InputError for a token that the model has not got."""
    for token, _ in request.sampling.logit_bias:
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
