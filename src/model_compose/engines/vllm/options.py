"""The class of `options` for `driver: vllm`, and the check for other options that this driver refuses."""

from typing import Annotated, Literal, Self

from pydantic import ByteSize, Field, model_validator

from model_compose.engines.options import ModelOptions, refuse_common, refuse_full_rank, refuse_given
from model_compose.errors import Keys
from model_compose.schema import LocalPath, Options, Seconds, Secret, SecretText, invalid
from model_compose.sources import LocalSource, PypiSource

FILE_ENDINGS = (".gguf", ".bin", ".safetensors", ".pt")
START_SECONDS = 600.0


class VllmOptions(Options):
    """`options` of vLLM."""

    python: LocalPath | None = Field(
        default=None, min_length=1, description="Interpreter of an environment with vLLM; that of `setup` if unset"
    )
    base_url: str | None = Field(
        default=None, pattern=r"^https?://", description="A vLLM server that runs already, such as http://host:8000"
    )
    api_key: SecretText | None = Field(default=None, description="The API key of the server at base_url")
    adapter_folder: LocalPath | None = Field(
        default=None, min_length=1, description="Where blends are written for the server at base_url to read"
    )
    max_loras: int = Field(default=4, ge=1, description="How many different blends may run at once; further ones wait")
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] | None = Field(
        default=None,
        description="The largest rank of a blend (the sum of its adapters' ranks); enough for all adapters if unset",
    )
    max_batch_size: int = Field(default=64, ge=1, description="How many sequences share a step; further ones wait")
    max_queue: int = Field(default=256, ge=0, description="Texts that may wait; one more request is answered 429")
    max_context: int | None = Field(
        default=None, ge=1, description="Longest prompt plus answer, in tokens; as much as fits if unset"
    )
    kv_cache: ByteSize | None = Field(
        default=None, ge=1, description="Memory for keys and values, such as 2GiB; vLLM's own choice on a GPU if unset"
    )
    prefix_cache: bool = Field(default=True, description="Keep keys and values for prompts with the same beginning")
    trust_remote_code: bool = Field(default=False, description="Run Python code that the model's repository brings")
    start_timeout: Seconds = Field(default=START_SECONDS, gt=0, description="Seconds in which the server must answer")
    env: Annotated[dict[str, str], Secret()] = Field(
        default={}, description="Further variables for the server, which inherits those of libraries and no secrets"
    )

    @model_validator(mode="after")
    def _one_server(self) -> Self:
        of_own = ("python", "max_batch_size", "kv_cache", "prefix_cache", "start_timeout", "env")
        of_other = ("api_key", "adapter_folder")
        for key in sorted(self.model_fields_set):
            if self.base_url is not None and key in of_own:
                raise invalid(f"'{key}' is for a server that model-compose starts; remove it or 'base_url'", key)
            if self.base_url is None and key in of_other:
                raise invalid(f"'{key}' is for a server at 'base_url'; leave it out", key)
        return self


def refuse(options: ModelOptions) -> None:
    """Raise ValueError for a model's option that vLLM cannot honour."""
    refuse_common(options)
    refuse_full_rank(options)
    own, model = options.options, options.model
    assert isinstance(own, VllmOptions)
    file = None if isinstance(model, PypiSource) else model.filename
    if isinstance(model, LocalSource) and model.path.endswith(FILE_ENDINGS):
        file = model.path
    refused: dict[Keys, tuple[bool, str]] = {
        ("model",): (file is not None, f"{file} is a single file, and it takes a folder of safetensors; for GGUF use "
                  "driver: llamacpp"),
        ("device",): (options.device != "auto", "its build decides; choose cards with CUDA_VISIBLE_DEVICES"),
        ("quantization",): (options.quantization is not None, "use a checkpoint that is quantised (AWQ, GPTQ, FP8)"),
        ("precision",): (
            own.base_url is not None and options.precision != "auto", "the server at base_url decides; leave it out"
        ),
    }  # fmt: skip
    for index, adapter in enumerate(options.peft_adapters):
        at = ("peft_adapters", index)
        refused[*at, "device"] = adapter.device is not None, "adapters compute on the base's device"
        refused[*at, "precision"] = adapter.precision != "auto", "adapters compute in the base's dtype"
    refuse_given(options, refused)
