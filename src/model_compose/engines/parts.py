"""What every driver does alike: fetching adapters, and turning prompts into token ids by the base's own tokenizer."""

from collections.abc import Container
from pathlib import Path
from typing import Any

from model_compose.engines import AdapterOptions, ModelOptions
from model_compose.errors import AdapterError, InputError, LoadError, Overloaded, SourceError
from model_compose.generation import Request
from model_compose.lora.adapter import WEIGHT_FILES, LoraAdapter, read_adapter
from model_compose.lora.blend import Blend
from model_compose.lora.peft_config import read_config
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


def tokenize(tokenizer: Any, context: int, request: Request) -> list[int]:
    """The prompt's token ids. Raises InputError for one that does not fit, or has no chat template to go through."""
    is_text = isinstance(request.prompt, str)
    text = request.prompt if isinstance(request.prompt, str) else _render_chat(tokenizer, request)
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError("the prompt holds half of a surrogate pair, which is no character", field="prompt")
    ids: list[int] = tokenizer(text, add_special_tokens=is_text)["input_ids"]
    if request.max_input_length is not None and len(ids) > request.max_input_length:
        left = tokenizer.truncation_side == "left"
        ids = ids[-request.max_input_length :] if left else ids[: request.max_input_length]
    if not ids:
        raise InputError("the prompt is empty, and this model has no token that starts a text", field="prompt")
    if len(ids) >= context:
        raise InputError(
            f"the prompt has {len(ids)} tokens, and this model's context holds {context} with the answer; "
            "shorten it, or set max_input_length to truncate it",
            field="prompt",
        )
    return ids


def check_logit_bias(request: Request, vocabulary: int) -> None:
    """Raises InputError for a token that the model has not got."""
    for token, _ in request.sampling.logit_bias:
        if token >= vocabulary:
            raise InputError(
                f"logit_bias names the token {token}, and this model has the tokens 0 to {vocabulary - 1}",
                field="logit_bias",
            )


def check_room(texts: int, rows: int, queue: int) -> None:
    """Raises Overloaded where as many texts run or wait as may: `rows` at once, and `queue` besides."""
    if texts >= rows + queue:
        raise Overloaded(
            f"{texts} texts run or wait already (max_batch_size {rows}, max_queue {queue}); try again in a moment"
        )


def check_loaded(blend: Blend, adapters: Container[str]) -> None:
    """Raises InputError for an adapter that has been unloaded since the blend was resolved."""
    if gone := [name for name in blend.active if name not in adapters]:
        raise InputError(f"the adapter '{gone[0]}' has been unloaded meanwhile", field="blend")


def _render_chat(tokenizer: Any, request: Request) -> str:
    import jinja2

    if not tokenizer.chat_template:
        raise InputError(
            "the base model has no chat template; use /v1/completions or task: text-generation", field="messages"
        )
    messages = [{"role": m.role, "content": m.content} for m in request.prompt if not isinstance(m, str)]
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise InputError(f"the base's chat template refuses these messages: {error}", field="messages") from error
    return text
