"""`options` of `driver: huggingface`, and what this driver refuses of a model's other options."""

from typing import Literal

from pydantic import ByteSize, Field

from model_compose.engines.options import ModelOptions, refuse_common
from model_compose.schema import Options, invalid


class HuggingfaceOptions(Options):
    """`options` of the embedded engine."""

    trust_remote_code: bool = Field(default=False, description="Run Python code that the model's repository brings")
    max_batch_size: int = Field(default=16, ge=1, description="Sequences that share a step; further ones wait")
    max_context: int | None = Field(
        default=None, ge=1, description="Longest prompt plus answer, in tokens; the model's own context if unset"
    )
    kv_cache: ByteSize | None = Field(
        default=None, ge=1, description="Memory for keys and values, such as 2GiB; a part of what is free if unset"
    )
    max_queue: int = Field(default=256, ge=0, description="Requests that may wait; one more is answered 429")
    prefix_cache: bool = Field(default=True, description="Keep keys and values for prompts that start alike")
    max_adapters_on_device: int | None = Field(
        default=None, ge=1, description="Adapters in the device's memory at once; the others stay in main memory"
    )
    fold: Literal["auto", "never", "always"] = Field(
        default="auto",
        description="Add a blend into the weights, which then costs nothing per token. auto: in float32, while all "
        "running requests use the same, and a blend by a method of full rank whenever it is asked for; always: the "
        "default blend, and no other is taken",
    )


def refuse(options: ModelOptions) -> None:
    """Raises ValueError for an option that is valid in general but that this driver cannot honour."""
    refuse_common(options)
    assert isinstance(options.options, HuggingfaceOptions)
    if options.allow_runtime_adapters and options.options.fold == "always":
        raise invalid(
            "fold: always cannot be with 'allow_runtime_adapters': a folded model takes no others; leave fold out",
            "allow_runtime_adapters",
        )
    if options.quantization is not None and options.options.fold == "always":
        raise invalid(
            "fold: always cannot be with 'quantization': a quantised base is never folded; leave fold out",
            "quantization",
        )
    _refuse_full_rank(options, options.options.fold)


def _refuse_full_rank(options: ModelOptions, fold: str) -> None:
    """Raises ValueError for a blend of full rank that cannot run: such blends run folded, in a copy of the weights."""
    blends = options.to_blends().full_rank
    if not blends:
        return
    if len(blends) > 1:
        raise invalid(
            f"the blends {' and '.join(blend.described for blend in blends)} have full rank and run folded into a copy of "
            "the weights, and a component holds one such copy; keep one of them, use method: svd, or give the others a "
            "component of their own",
            "blends", blends[1].name or "",
        )  # fmt: skip
    reason = None
    if options.quantization is not None:
        reason = "and a quantised base is never folded; use method: svd, or leave quantization out"
    elif fold == "always":
        reason = "but fold: always takes the default blend alone; use method: svd, or set fold: auto"
    elif fold == "never":
        reason = "and fold is never; use method: svd, or set fold: auto"
    if reason is not None:
        which = f"the blend {blends[0].described} has full rank and runs folded into the weights only"
        raise invalid(f"{which}, {reason}", "blends", blends[0].name or "")
