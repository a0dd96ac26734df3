"""Loading: from model references to a base model with its adapters attached, checked before the large download ends."""

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model_compose.engines import sizes
from model_compose.engines.adapters import fetch_adapters
from model_compose.engines.blueprint import Blueprint, base_config, load_errors, on_meta, other_base, read_blueprint
from model_compose.engines.devices import (
    Devices,
    check_quantization,
    named_dtype,
    pick_device,
    pick_dtype,
)
from model_compose.engines.huggingface import memory
from model_compose.engines.huggingface.decoder import LlamaForward, native_for, takes
from model_compose.engines.huggingface.forward import NAME as ATTENTION
from model_compose.engines.huggingface.forward import Forward, TransformersForward, own_attention
from model_compose.engines.huggingface.quantized import quantize_modules
from model_compose.engines.needs import check_fits
from model_compose.engines.on_disk import CONFIG_FILES, check_chat_template, check_kind
from model_compose.engines.options import AdapterOptions, ModelOptions
from model_compose.engines.tokenizer import load_tokenizer
from model_compose.errors import LoadError
from model_compose.lora.adapter import LoraAdapter, check, is_copy
from model_compose.lora.layers import LoraModel, Placement
from model_compose.progress import Progress, Report
from model_compose.sources import Fetched, HuggingfaceSource, describe, fetch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """Everything that generation needs.

    context: the longest prompt plus text, in tokens. eos: the ids that end a text. identity: of the base.
    """

    lora: LoraModel
    forward: Forward
    tokenizer: Any
    device: torch.device
    context: int
    eos: tuple[int, ...]
    identity: str

    @property
    def model(self) -> nn.Module:
        return self.lora.model

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the base computes."""
        return self.model.get_input_embeddings().weight.dtype  # type: ignore[operator,no-any-return]

    @property
    def vocabulary(self) -> int:
        """The width of the logits."""
        config: Any = self.model.config
        return int(config.get_text_config().vocab_size)


def load(options: ModelOptions, base_dir: Path, report: Report, *, max_adapters: int | None = None) -> LoadedModel:
    """Fetches and loads base and adapters. Blocks. Raises SourceError, AdapterError, LoadError."""
    from transformers.utils import logging as transformers_logging

    device = pick_device(options.device)
    check_quantization(options.quantization, str(device))
    if options.quantization and device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is None:
        raise LoadError(
            f"quantization: {options.quantization} on {device} needs bitsandbytes; pip install bitsandbytes"
        )
    named = dict(zip(options.adapter_names, options.peft_adapters, strict=True))
    placements = {name: placement(adapter) for name, adapter in named.items()}  # before anything is fetched
    adapters = fetch_adapters(options, base_dir, report)
    checked = _preflight(options, base_dir, adapters)
    base = fetch(options.model, base_dir=base_dir, report=report)
    check_kind(base, "huggingface")
    transformers_logging.set_verbosity_error()
    with _tqdm_reports(report), load_errors(describe(options.model), device):
        tokenizer = load_tokenizer(base, options.trust_remote_code, chat=options.chats)
        config = base_config(base, options.trust_remote_code)
        if not checked:
            blueprint = Blueprint(describe(options.model), config, on_meta(config, options.trust_remote_code))
            _check_blueprint(options, blueprint, sizes.checkpoint_of(base.sizes(), base.file), adapters)
            _warn_of_other_base(adapters, options, base)
        model = _load_model(base, config, options, device)
        report(Progress("attaching adapters", 0, len(adapters), "adapters"))
        by_kernel = options.quantization if device.type == "cpu" else None
        if by_kernel is not None and not takes(model):
            quantize_modules(model, by_kernel)
        native = native_for(model, device)
        lora = LoraModel(
            model, adapters, placements, max_on_device=max_adapters, dtype=None if native is None else torch.float32,
            holds=_holds(base, model),
        )  # fmt: skip
        report(Progress("attaching adapters", len(adapters), len(adapters), "adapters"))
        forward: Forward
        if takes(model):
            forward = LlamaForward(lora, by_kernel, native)
        else:
            theirs = TransformersForward(model, device, describe(options.model))
            lora.refuse(theirs.unfit)
            forward = theirs
    context = sizes.context_length(model.config, options.max_seq_length)
    loaded = LoadedModel(lora, forward, tokenizer, device, context, _eos(model, tokenizer), base.identity)
    if native is None:
        _warn_of_slow_dtype(loaded)
    return loaded


def _warn_of_slow_dtype(loaded: LoadedModel) -> None:
    """Warns if the base is bfloat16 and the processor has no instructions for it. Prompts take ten times as long then."""
    if loaded.dtype == torch.bfloat16 and pick_dtype("auto", loaded.device) == torch.float32:
        log.warning(
            "this processor does not compute bfloat16 natively, so prompts and batches are slow; precision: float32, or "
            "quantization: int8 for less memory, is faster here"
        )


def placement(options: AdapterOptions) -> Placement:
    """Where one adapter computes. Raises LoadError for a device that this machine does not have."""
    device = None if options.device is None else pick_device(options.device)
    return Placement(device, None if options.precision == "auto" else named_dtype(options.precision))


def _preflight(options: ModelOptions, base_dir: Path, adapters: list[LoraAdapter]) -> bool:
    """Checks adapters and memory by the base's config, before its weights are fetched.

    Returns False, and checks nothing, if all files are here already.
    """
    if not isinstance(options.model, HuggingfaceSource) or options.model.filename is not None:
        return False  # everything is on disk already, or the config is inside the GGUF file: checked when attached
    configs = fetch(options.model, base_dir=base_dir, only=CONFIG_FILES)
    if options.chats:
        check_chat_template(configs)
    with load_errors(describe(options.model), torch.device("meta")):
        _check_blueprint(options, read_blueprint(options, configs), sizes.Checkpoint(), adapters)
    _warn_of_other_base(adapters, options, configs)
    return True


def _check_blueprint(
    options: ModelOptions, blueprint: Blueprint, checkpoint: sizes.Checkpoint, adapters: list[LoraAdapter]
) -> None:
    """Checks that the adapters' shapes fit the base, and that all of it fits into memory.

    Raises AdapterError, LoadError.
    """
    _check_layers(blueprint)
    held = {adapter.name: sizes.loaded_size(check(adapter, blueprint.shapes)) for adapter in adapters}
    for needs in memory.needs(options, blueprint, held, checkpoint, Devices()):
        check_fits(needs)


def _warn_of_other_base(adapters: list[LoraAdapter], options: ModelOptions, base: Fetched) -> None:
    """Warns of adapters that were trained on another base. Their shapes have been checked before."""
    for adapter in adapters:
        if warning := other_base(adapter, options, base):
            log.warning("adapter '%s' %s", adapter.name, warning)


def _load_model(base: Fetched, config: Any, options: ModelOptions, device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM, GgufConfig

    extra: dict[str, Any] = {}
    if base.file:
        extra = {"gguf_file": base.file, "quantization_config": GgufConfig(dequantize=True)}
    if device.type != "cpu":
        extra["device_map"] = {"": device}
        if options.quantization is not None:
            extra["quantization_config"] = _bitsandbytes(options)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            base.folder,
            attn_implementation=ATTENTION,
            config=config,  # reading a config from a GGUF file takes seconds
            dtype=pick_dtype(options.precision, device),
            trust_remote_code=options.trust_remote_code,
            local_files_only=True,
            **extra,
        )
    except KeyError as error:
        if error.args != (ATTENTION,):
            raise
        raise LoadError(own_attention(describe(options.model), " or ".join(config.architectures or ()))) from error
    return model.eval().requires_grad_(False)


def _holds(base: Fetched, model: Any) -> Callable[[str, torch.Tensor], bool | None]:
    """A function that tells whether a tensor equals the base's parameter of that name.

    It reads the base's files, since the model's own weights may be packed or folded.
    """
    from model_compose.checkpoint.reading import copy_checker

    stored = copy_checker(base, model)

    def holds(name: str, tensor: torch.Tensor) -> bool | None:
        try:
            return stored(name, tensor)
        except LoadError:  # the files are quantised; embedding and head are plain in the model
            return is_copy(tensor, dict(model.named_parameters(remove_duplicate=False)).get(name))

    return holds


def _bitsandbytes(options: ModelOptions) -> Any:
    from transformers import BitsAndBytesConfig

    if options.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if options.precision == "auto" else named_dtype(options.precision)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=options.quantization, bnb_4bit_compute_dtype=compute
    )


def _check_layers(blueprint: Blueprint) -> None:
    """Refuses layers that are no attention layers: the KV cache holds only keys and values. Raises LoadError."""
    listed = getattr(blueprint.config.get_text_config(), "layer_types", None) or []
    kinds = set(listed) - {"full_attention", "sliding_attention"}
    if kinds:
        raise LoadError(
            f"{blueprint.name} has layers of kind {', '.join(sorted(kinds))}, which the embedded engine cannot serve yet"
        )


def _eos(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    config: Any = model.generation_config
    listed = config.eos_token_id
    ids = listed if isinstance(listed, list) else [listed]
    return tuple({int(token) for token in (*ids, tokenizer.eos_token_id) if token is not None})


@contextmanager
def _tqdm_reports(report: Report) -> Iterator[None]:
    """Sends the progress of transformers (reading GGUF blocks, placing weights) to the report instead of to its own
    bars.
    """
    import transformers.modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging as transformers_logging

    def bar(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _Bar(report, *args, **kwargs)

    before = transformers_logging.set_tqdm_hook(bar)
    # The GGUF reader uses tqdm directly, without the hook.
    gguf: Any = gguf_reader
    gguf_bar, gguf.tqdm = gguf.tqdm, functools.partial(_Bar, report)
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        transformers_logging.set_tqdm_hook(before)


class _Bar:
    """The part of tqdm's interface that transformers uses while loading."""

    def __init__(self, report: Report, iterable: Any = None, *, desc: str = "", total: int | None = None, **_: Any):
        self._report, self._iterable, self._done = report, iterable, 0
        self._what = (desc or "loading").rstrip(".:").lower()
        self._total = total if total is not None else len(iterable) if hasattr(iterable, "__len__") else None

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update(1)

    def update(self, count: int = 1) -> None:
        self._done += count
        self._report(Progress(self._what, self._done, self._total, "tensors"))

    def set_postfix(self, *_: Any, **__: Any) -> None: ...
    def set_description(self, *_: Any, **__: Any) -> None: ...
    def refresh(self) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None: ...
