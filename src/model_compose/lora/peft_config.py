"""adapter_config.json: read, and judged by what can be computed exactly; and what it says of each module.

PEFT itself only warns about keys that it does not know, so the decision rests on the lists below, not on PEFT.
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

# Config keys whose value changes nothing in the forward pass, or is read below.
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
# Values of init_lora_weights that leave the base's weights as they are.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Features whose effect is more than s·B·A, and what a reader may know them as.
REFUSED = {
    "use_dora": "DoRA rescales the merged weight, so its effect is not a weighted sum",
    "lora_bias": "a bias on B is not part of the low-rank sum",
    "modules_to_save": "it replaces whole modules of the base, which cannot be weighted",
    "trainable_token_indices": "it replaces rows of the embedding, which cannot be weighted",
    "target_parameters": "LoRA on bare parameters (experts) is not supported",
    "layer_replication": "it changes the number of layers",
    "alora_invocation_tokens": "aLoRA switches on in the middle of a prompt",
    "enable_lora": "merged projections of PEFT before 0.1 are not supported",
    "merge_weights": "merged projections of PEFT before 0.1 are not supported",
}
MAX_CONFIG_BYTES = 16 << 20
MAX_RANK = 1 << 16
"""Wider than any model's layers, and so more than any update of theirs has."""

Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(ge=-1e30, le=1e30)]
Names = str | list[str] | None


class PeftConfig(BaseModel):
    """What we or PEFT read of a config, in the types that PEFT writes. The lists above judge the other keys."""

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
def of_adapter(name: str) -> Iterator[None]:
    """Every failure within names the adapter. Raises AdapterError."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"adapter '{name}': {error}") from error.__cause__
    except OSError as error:
        raise AdapterError(f"adapter '{name}': {error.filename} cannot be read ({error.strerror})") from error
    except MemoryError as error:
        raise AdapterError(f"adapter '{name}': there is no memory for its weights") from error


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The adapter's config, checked against the lists of what is exact. Raises AdapterError."""
    with of_adapter(name):
        config = _parse(folder)
        if (kind := config.get("peft_type")) != "LORA":
            raise AdapterError(f"peft_type is {_short(kind)}; only 'LORA' adapters can be combined")
        if (init := config.get("init_lora_weights", True)) not in PLAIN_INITS:
            raise AdapterError(
                f"init_lora_weights is {_short(init)}, which changes the base model's own weights when it is loaded "
                "(PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ); convert it to a plain LoRA first (PEFT: "
                "save_pretrained(path_initial_model_for_weight_conversion=...))"
            )
        _check_types(config)
        for key, value in config.items():
            if key in HARMLESS or key in ("init_lora_weights", "bias") or value in (None, False, [], {}, ""):
                continue
            reason = REFUSED.get(key, "model-compose does not know this option, and might compute something else")
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
        raise AdapterError(f"{path} is larger than {MAX_CONFIG_BYTES >> 20} MiB, which no config is")
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
    for key in ("target_modules", "exclude_modules"):  # PEFT matches these
        if isinstance(pattern := getattr(checked, key), str):
            with _of_pattern(key, pattern):
                re.compile(pattern)


def _check_patterns(key: str, patterns: list[str]) -> None:
    costly = [pattern for pattern in patterns if _COSTLY.search(pattern)]
    if len(costly) > MAX_COSTLY or sum(map(len, costly)) > MAX_PATTERN:
        raise AdapterError(
            f"{key} has more than {MAX_COSTLY:,} patterns with wildcards, or more than {MAX_PATTERN:,} characters of them; "
            "write the modules' names"
        )
    for pattern in patterns:
        with _of_pattern(key, pattern):
            _matcher(f"(?:{pattern}){{0}}" if pattern in costly else pattern)  # is parsed and takes no memory
    with _of_pattern(key, "".join(costly)):
        _matcher("".join(f"(?:{pattern})" for pattern in costly))  # is refused where all of them together take too much


@contextmanager
def _of_pattern(key: str, pattern: str) -> Iterator[None]:
    try:
        yield
    except (re.error, RecursionError, OverflowError, SchemaError) as error:
        reason = str(error).splitlines()[-1].strip().removeprefix("SchemaError: ").removeprefix("error: ")
        said = f"{key}: {_short(pattern)}"
        for what in ("look-around", "backreferences"):
            if reason.startswith(what):
                raise AdapterError(
                    f"{said} uses {what}, which is not evaluated, since it may take for ever; write the modules' names, "
                    "such as model.layers.0.self_attn.q_proj"
                ) from None
        raise AdapterError(f"{said} is no pattern that can be matched ({reason})") from None


# What it says of a module.


def scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    """s = alpha / r, or alpha / √r for rsLoRA (arXiv 2312.03732); r and alpha per module where patterns name it.

    rank: of the stored factors. Raises AdapterError where the config says another.
    """
    if rank != (told := rank_of(config, path)):
        raise AdapterError(
            f"{path} has rank {rank} in its weights, and {CONFIG_FILE} says {told} (r, rank_pattern), so its scaling "
            "alpha / r is not known; take both files from the same training"
        )
    alpha = _value(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def rank_of(config: Mapping[str, Any], path: str) -> int:
    return int(_value(config.get("rank_pattern") or {}, path, config.get("r", 8)))


def _value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first key that matches the end of the path, as PEFT's get_pattern_key decides it."""
    matchers = zip(_at_the_end(tuple(patterns)), patterns.values(), strict=True)
    return next((value for matches, value in matchers if matches(path)), default)


def whole(key: str, pattern: str) -> Callable[[str], object]:
    """Whether a path is all that a pattern says, as PEFT takes a text under target_modules. Raises AdapterError."""
    if len(pattern) > MAX_PATTERN:
        raise AdapterError(
            f"{key}: {_short(pattern)} is longer than {MAX_PATTERN:,} characters; list the modules' names"
        )
    with _of_pattern(key, pattern):
        return _matcher(pattern)


def check_plain(key: str, patterns: list[str]) -> None:
    """Raises AdapterError for patterns with wildcards: PEFT looks for these within a path."""
    for pattern in patterns:
        if _COSTLY.search(pattern):
            raise AdapterError(f"{key}: {_short(pattern)} has wildcards, which are not evaluated there; write names")
        with _of_pattern(key, pattern):
            re.compile(pattern)


_COSTLY = re.compile(r"[*+?{|(]")
MAX_COSTLY = 1024
MAX_PATTERN = 1 << 16


@functools.lru_cache(maxsize=4)  # the patterns of ranks and of alphas, of an adapter or two
def _at_the_end(patterns: tuple[str, ...]) -> list[Callable[[str], object]]:
    return [_matcher(pattern, r"(.*\.)?") for pattern in patterns]


def _matcher(pattern: str, before: str = "") -> Callable[[str], object]:
    """Says whether all of a path matches.

    Python tries a pattern like (a|aa)+ in every way there is, for years, so those with choices are matched in time that
    grows with the path alone. Raises re.error, SchemaError.
    """
    if not _COSTLY.search(pattern):
        return re.compile(f"{before}({pattern})").fullmatch
    schema = core_schema.str_schema(pattern=f"^{before}({pattern})$", regex_engine="rust-regex")
    return SchemaValidator(schema).isinstance_python


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
