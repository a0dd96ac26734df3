"""Reads adapter_config.json, refuses what we cannot compute exactly, and finds the rank and scaling of each module.

PEFT only warns about keys that it does not know, so we decide by the lists below.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import SchemaError, SchemaValidator, core_schema

from model_compose.errors import AdapterError
from model_compose.expressions import strict_json

CONFIG_FILE = "adapter_config.json"

# Config keys that do not change the forward pass, and keys that the code below reads.
HARMLESS = frozenset(
    [
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "fan_in_fan_out",
        "use_rslora",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "ensure_weight_tying",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
    ]
)
# Values of init_lora_weights with which PEFT leaves the base's weights as they are.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Features whose effect is more than s·B·A, each with the reason that the error gives.
REFUSED = {
    "use_dora": "DoRA rescales the merged weight, so its effect is not a weighted sum",
    "lora_bias": "a bias on B is not part of the low-rank sum",
    "modules_to_save": "it replaces whole modules of the base, and a replacement cannot be scaled by a weight",
    "trainable_token_indices": "it replaces rows of the embedding, and a replacement cannot be scaled by a weight",
    "target_parameters": "LoRA on bare parameters (experts) is not supported",
    "layer_replication": "it changes the number of layers",
    "alora_invocation_tokens": "aLoRA acts only on the part of a prompt after its invocation tokens",
    "enable_lora": "merged projections of PEFT before 0.1 are not supported",
    "merge_weights": "merged projections of PEFT before 0.1 are not supported",
}
MAX_CONFIG_BYTES = 16 << 20
MAX_RANK = 1 << 16
"""More than the width of any model's layers, which bounds the rank of any update."""

Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(ge=-1e30, le=1e30)]
Names = str | list[str] | None


class PeftConfig(BaseModel):
    """The config keys that we or PEFT read, with the types that PEFT writes. The lists above decide on the other keys."""

    model_config = ConfigDict(strict=True)
    base_model_name_or_path: str | None = None
    bias: str | None = "none"
    r: Rank = 8
    lora_alpha: Alpha = 8
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    use_rslora: bool | None = False
    ensure_weight_tying: bool | None = False
    target_modules: Names = None
    exclude_modules: Names = None
    layers_pattern: Names = None
    layers_to_transform: int | list[int] | None = None


@contextmanager
def naming_adapter(name: str) -> Iterator[None]:
    """A context in which every AdapterError, OSError and MemoryError becomes an AdapterError that names the adapter."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"adapter '{name}': {error}") from error.__cause__
    except OSError as error:
        raise AdapterError(f"adapter '{name}': {error.filename} cannot be read ({error.strerror})") from error
    except MemoryError as error:
        raise AdapterError(f"adapter '{name}': there is not enough memory for its weights") from error


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Read and check the adapter's config. Raises AdapterError for any key or value that we cannot compute exactly."""
    with naming_adapter(name):
        config = _parse(folder)
        if (kind := config.get("peft_type")) != "LORA":
            raise AdapterError(f"peft_type is {_short(kind)}; only adapters of type 'LORA' can be combined")
        if (init := config.get("init_lora_weights", True)) not in PLAIN_INITS:
            raise AdapterError(
                f"init_lora_weights is {_short(init)}, with which PEFT changes the base model's own weights as it loads "
                "the adapter (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ); convert the adapter to a plain LoRA first (PEFT: "
                "save_pretrained(path_initial_model_for_weight_conversion=...))"
            )
        _check_types(config)
        for key, value in config.items():
            if key in HARMLESS or key in ("init_lora_weights", "bias") or value in (None, False, [], {}, ""):
                continue
            reason = REFUSED.get(key, "model-compose does not know this option, so its result could be wrong")
            raise AdapterError(f"{key[:60]} is {_short(value)}; {reason}. Such an adapter is refused.")
    return config


def _parse(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        inner = sorted(each.parent.name for each in folder.glob(f"*/{CONFIG_FILE}"))
        raise AdapterError(
            f"{folder} has no {CONFIG_FILE}; "
            + (f"name one of the adapters in it: {', '.join(inner)}" if inner else "is it a PEFT adapter's folder?")
        )
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path} is larger than {MAX_CONFIG_BYTES >> 20} MiB, so it cannot be an adapter's config")
    try:
        config = strict_json(path.read_bytes())
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold a JSON object")
    return config


def _check_types(config: Mapping[str, Any]) -> None:
    try:
        checked = PeftConfig.model_validate(config)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        raise AdapterError(f"{place} is {_short(wrong['input'])}: {wrong['msg']}") from None
    if checked.bias not in ("none", "all", "lora_only", None):
        raise AdapterError(f"bias is {_short(checked.bias)}; known are 'none', 'all' and 'lora_only'")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(key, list(getattr(checked, key) or ()))
    for key in ("target_modules", "exclude_modules"):  # PEFT takes a string here as a regular expression
        if isinstance(pattern := getattr(checked, key), str):
            with _naming_pattern(key, pattern):
                re.compile(pattern)


def _check_patterns(key: str, patterns: list[str]) -> None:
    costly = [pattern for pattern in patterns if _COSTLY.search(pattern)]
    if len(costly) > MAX_COSTLY or sum(map(len, costly)) > MAX_PATTERN:
        raise AdapterError(
            f"{key} has more than {MAX_COSTLY:,} patterns with wildcards, or they are longer than {MAX_PATTERN:,} "
            "characters together; list the modules' full names"
        )
    for pattern in patterns:
        with _naming_pattern(key, pattern):
            _matcher(f"(?:{pattern}){{0}}" if pattern in costly else pattern)  # {0}: parses it, but compiles nothing
    with _naming_pattern(key, "".join(costly)):
        _matcher("".join(f"(?:{pattern})" for pattern in costly))  # fails if they need too much memory together


@contextmanager
def _naming_pattern(key: str, pattern: str) -> Iterator[None]:
    try:
        yield
    except (re.error, RecursionError, OverflowError, SchemaError) as error:
        reason = str(error).splitlines()[-1].strip().removeprefix("SchemaError: ").removeprefix("error: ")
        named = f"{key}: {_short(pattern)}"
        for what in ("look-around", "backreferences"):
            if reason.startswith(what):
                raise AdapterError(
                    f"{named} uses {what}, which model-compose does not evaluate, since that can take years; list the "
                    "modules' full names, such as model.layers.0.self_attn.q_proj"
                ) from None
        raise AdapterError(f"{named} is not a valid pattern ({reason})") from None


# The rank and scaling of a module.


def scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    """The scaling s of the module at `path`: alpha / r, or alpha / √r for rsLoRA (arXiv 2312.03732).

    r and alpha come from rank_pattern and alpha_pattern if a pattern matches the path, else from the config's defaults.
    rank: r of the stored factors. Raises AdapterError if the config gives another r.
    """
    if rank != (configured := rank_of(config, path)):
        raise AdapterError(
            f"{path} has rank {rank} in its weights, but {CONFIG_FILE} says {configured} (r, rank_pattern), so its scaling "
            "alpha / r is unknown; take both files from the same training"
        )
    alpha = _value(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def rank_of(config: Mapping[str, Any], path: str) -> int:
    """The rank r that the config gives the module at `path`."""
    return int(_value(config.get("rank_pattern") or {}, path, config.get("r", 8)))


def _value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern that matches the end of the path, by the rule of PEFT's get_pattern_key."""
    matchers = zip(_suffix_matchers(tuple(patterns)), patterns.values(), strict=True)
    return next((value for matches, value in matchers if matches(path)), default)


def full_matcher(key: str, pattern: str) -> Callable[[str], object]:
    """A test whether a pattern matches the whole of a path, as PEFT treats a string under target_modules.

    Raises AdapterError for a pattern that is too long or not valid.
    """
    if len(pattern) > MAX_PATTERN:
        raise AdapterError(
            f"{key}: {_short(pattern)} is longer than {MAX_PATTERN:,} characters; list the modules' names"
        )
    with _naming_pattern(key, pattern):
        return _matcher(pattern)


def check_plain(key: str, patterns: list[str]) -> None:
    """Raise AdapterError for patterns with wildcards. (PEFT searches for these patterns inside a path.)"""
    for pattern in patterns:
        if _COSTLY.search(pattern):
            raise AdapterError(
                f"{key}: {_short(pattern)} has wildcards, which model-compose does not evaluate here; write names"
            )
        with _naming_pattern(key, pattern):
            re.compile(pattern)


# What gives a pattern more than one way to match. Such patterns may be costly to compile or to match.
_COSTLY = re.compile(r"[*+?{|(]")
MAX_COSTLY = 1024
MAX_PATTERN = 1 << 16


@functools.lru_cache(maxsize=4)  # rank_pattern and alpha_pattern of two adapters
def _suffix_matchers(patterns: tuple[str, ...]) -> list[Callable[[str], object]]:
    return [_matcher(pattern, r"(.*\.)?") for pattern in patterns]


def _matcher(pattern: str, before: str = "") -> Callable[[str], object]:
    """A test whether `before` + `pattern` matches the whole of a path.

    Python's `re` tries every way to match a pattern like (a|aa)+, which can take years. So patterns with wildcards are
    matched by Rust's regex engine, whose time is linear in the path's length. Raises re.error or SchemaError.
    """
    if not _COSTLY.search(pattern):
        return re.compile(f"{before}({pattern})").fullmatch
    schema = core_schema.str_schema(pattern=f"^{before}({pattern})$", regex_engine="rust-regex")
    return SchemaValidator(schema).isinstance_python


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
