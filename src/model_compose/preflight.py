"""Checks a configuration against the files on this machine, before anything is fetched or loaded.

Reports all problems at once, each with its line. Never asks the network.

Reads configs and headers alone (engines/on_disk.py), which takes milliseconds. A checkpoint may name or fuse modules in
another way than the model does. Where the headers therefore cannot tell whether an adapter fits, we build the model
without its weights. That imports torch and takes seconds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from model_compose.checkpoint import files
from model_compose.components import located
from model_compose.engines import ENGINES, on_disk
from model_compose.engines.devices import check_device, check_quantization
from model_compose.engines.options import ModelOptions
from model_compose.engines.prompts import check_tokens
from model_compose.errors import ComposeError, Keys, SourceError
from model_compose.headers import Gguf, Stored
from model_compose.loading import ComposeFile
from model_compose.lora.adapter import LoraAdapter, ModuleShape, check
from model_compose.lora.gguf import PERMUTED, PLAIN, Architecture
from model_compose.lora.header import has_weights, read_header, shapes_in
from model_compose.lora.peft_config import read_config
from model_compose.schema import has_expression
from model_compose.sources import Fetched, ModelSource, fetch_offline


@dataclass(frozen=True)
class Base:
    """What the files tell about a base.

    weights: the tensors of a folder's checkpoint, if its files have headers. gguf: the header of a GGUF file.
    """

    fetched: Fetched
    config: Mapping[str, Any]
    weights: Mapping[str, Stored] | None = None
    gguf: Gguf | None = None

    @property
    def vocabulary(self) -> int | None:
        """The width of the logits."""
        size = self.config.get("vocab_size")
        if self.gguf is not None and "token_embd.weight" in self.gguf.tensors:
            size = next(reversed(self.gguf.tensors["token_embd.weight"].shape), None)
        return size if isinstance(size, int) else None


class Findings:
    """The problems found so far, each with the keys of the YAML that it is about."""

    def __init__(self) -> None:
        self.found: list[tuple[Keys, ComposeError]] = []

    @contextmanager
    def at(self, *keys: str | int) -> Iterator[None]:
        """Records an error of the block, under `keys`, and goes on after the block."""
        try:
            yield
        except ComposeError as error:
            self.found.append(((*keys, *error.at), error))


def check_files(loaded: ComposeFile, *, weights: bool = True) -> None:
    """Raises an error of the first problem's class, whose message has one line for each problem.

    weights: whether the weights must be on this machine. If False, the configs are enough.
    """
    findings = Findings()
    for at, component in located(loaded.config.component, loaded.config.components, "component"):
        if isinstance(component, ModelOptions):
            _check_model(findings, at, component, loaded, weights)
    if findings.found:
        lines = [f"{loaded.place(keys)}: {error}" for keys, error in findings.found]
        raise type(findings.found[0][1])("\n".join(lines))


def _check_model(findings: Findings, at: Keys, options: ModelOptions, loaded: ComposeFile, weights: bool) -> None:
    with findings.at(*at, "device"):
        check_device(options.device)
        if options.device != "auto":
            with findings.at(*at, "quantization"):
                check_quantization(options.quantization, options.device)
    base = None
    with findings.at(*at, "model"):
        base = _read_base(options, loaded, weights)
    adapters: dict[int, LoraAdapter] = {}
    for number, (name, adapter) in enumerate(zip(options.adapter_names, options.peft_adapters, strict=True)):
        with findings.at(*at, "peft_adapters", number, "device"):
            check_device(adapter.device or "auto")
        with findings.at(*at, "peft_adapters", number, "model"):
            if read := _read_adapter(name, adapter.model, loaded, weights):
                adapters[number] = read
    with findings.at(*at, "options"):
        named = {options.adapter_names[number]: adapter for number, adapter in adapters.items()}
        ENGINES[options.driver].preflight(options, named, loaded.base_dir)
    if base is not None:
        unsure = []
        for number, read in adapters.items():
            with findings.at(*at, "peft_adapters", number, "model"):
                if not _check_shapes(base, read):
                    unsure.append(number)
        _check_exactly(findings, at, options, base, {number: adapters[number] for number in unsure})
    _check_actions(findings, at, options, base)


# The base.


def _read_base(options: ModelOptions, loaded: ComposeFile, weights: bool) -> Base | None:
    """What its files tell; None if they are not on this machine. Raises SourceError, LoadError."""
    fetched = fetch_offline(options.model, base_dir=loaded.base_dir)
    if fetched is None:
        return None
    on_disk.check_kind(fetched, options.driver)
    if fetched.file is not None:
        parts = on_disk.gguf_parts(fetched.folder / fetched.file)
        headers = [on_disk.gguf_header(part) for part in parts]
        whole = replace(headers[0], tensors={name: each for part in headers for name, each in part.tensors.items()})
        if options.chats:
            on_disk.check_chat_template(fetched, whole)
        return Base(fetched, {}, gguf=whole)
    config = on_disk.read_config(fetched)
    elsewhere = options.options.model_dump().get("base_url")  # the address of a server that has the weights itself
    tensors = None
    if files.has_weights(fetched.folder) or (weights and not elsewhere):
        tensors = on_disk.read_weights(fetched)
    if weights:
        on_disk.check_tokenizer(fetched)
    if options.chats and on_disk.has_tokenizer(fetched):
        on_disk.check_chat_template(fetched)
    return Base(fetched, config, tensors)


# Adapters.


def _read_adapter(name: str, source: ModelSource, loaded: ComposeFile, weights: bool) -> LoraAdapter | None:
    """The adapter with the shapes of its factors; None if its files, or its weights, are not on this machine.

    Raises SourceError, AdapterError.
    """
    try:
        fetched = fetch_offline(source, base_dir=loaded.base_dir)
    except SourceError as error:
        raise SourceError(f"adapter '{name}': {error}") from error
    if fetched is None:
        return None
    if not weights and not has_weights(fetched.folder):
        read_config(fetched.folder, name)
        return None
    return read_header(fetched.folder, name)


def _check_shapes(base: Base, adapter: LoraAdapter) -> bool:
    """Whether the headers show that the adapter fits. False if they cannot tell. Raises AdapterError if it does not fit."""
    if base.gguf is not None:
        architecture = _architecture(base.gguf)
        if architecture is None:
            return True  # we do not know this architecture; the driver checks the adapter when it loads
        sizes = {name: stored.shape for name, stored in base.gguf.tensors.items() if len(stored.shape) == 2}
        check(adapter, architecture.shapes(adapter.modules, sizes))
        return True
    shapes: dict[str, ModuleShape] = shapes_in(base.weights or {}, adapter)
    told = {path: factors for path, factors in adapter.modules.items() if path in shapes}
    check(replace(adapter, modules=told), shapes)
    return len(told) == len(adapter.modules)


def _architecture(gguf: Gguf) -> Architecture | None:
    """What maps GGUF's tensor names to modules; None for an architecture whose names we do not know."""
    name = gguf.fields.get("general.architecture")
    layers, heads = (gguf.fields.get(f"{name}.{key}") for key in ("block_count", "attention.head_count"))
    if name not in PERMUTED | PLAIN or not isinstance(layers, int) or not isinstance(heads, int):
        return None
    return Architecture(name, layers, heads, heads, tied="output.weight" not in gguf.tensors)


def _check_exactly(
    findings: Findings, at: Keys, options: ModelOptions, base: Base, adapters: Mapping[int, LoraAdapter]
) -> None:
    """Checks adapters against the modules of the model itself, which is built from its config without weights.

    Skipped for a model that brings its own code: that code runs when the model is loaded, and not before.
    """
    if not adapters or base.gguf is not None or options.trust_remote_code:
        return
    from model_compose.engines.blueprint import read_blueprint

    shapes: Mapping[str, ModuleShape] = {}
    with findings.at(*at, "model"):
        shapes = read_blueprint(options, base.fetched).shapes
    for number, adapter in adapters.items() if shapes else ():
        with findings.at(*at, "peft_adapters", number, "model"):
            check(adapter, shapes)


# What actions ask for.


def _check_actions(findings: Findings, at: Keys, options: Any, base: Base | None) -> None:
    """Checks the response formats and the tokens of logit_bias that the YAML fixes.

    A format must be one that text can follow, and a token one that the base has.
    """
    own = options.options.model_dump()
    for place, action in located(options.action, options.actions, "action"):
        given = action.response_format
        format = None if given is None or has_expression(given) else given.format
        if format is not None and not own.get("base_url"):  # another server has its own grammars
            from model_compose.engines.stepping.grammar import check_format

            with findings.at(*at, *place, "response_format"):
                check_format(format)
        bias = getattr(action.params, "logit_bias", None)
        if isinstance(bias, Mapping) and base is not None and base.vocabulary is not None:
            with findings.at(*at, *place, "params", "logit_bias"):
                check_tokens([token for token in bias if isinstance(token, int)], base.vocabulary)
