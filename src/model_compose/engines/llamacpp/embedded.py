"""The engine of `driver: llamacpp` in this process: a GGUF base, and any blend for any request.

llama.cpp only computes logits. Prompts, sampling, response formats and text are handled by the same code as in the embedded
engine, so that both drivers give the same answer to the same request.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model_compose.daemon import in_daemon_thread
from model_compose.engines import Stats
from model_compose.engines.llamacpp.options import LlamacppOptions
from model_compose.engines.options import AdapterOptions, ModelOptions
from model_compose.engines.prompts import Prompts
from model_compose.engines.stepping.engine import Running, SteppingEngine
from model_compose.generation import ResponseFormat
from model_compose.lora.adapter import LoraAdapter
from model_compose.lora.blend import Blends
from model_compose.progress import Progress, Report

if TYPE_CHECKING:
    from model_compose.engines.llamacpp.base import Base
    from model_compose.engines.llamacpp.batch import Batch
    from model_compose.engines.llamacpp.llama import Llama

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LlamaModel:
    """A loaded model. token_bytes: the bytes of one token's keys and values."""

    llama: "Llama"
    batch: "Batch"
    token_bytes: int


class EmbeddedEngine(SteppingEngine):
    """Runs llama.cpp. A step computes only one blend, so blends take turns."""

    def __init__(self, options: ModelOptions, blends: Blends, base_dir: Path) -> None:
        own = options.options
        assert isinstance(own, LlamacppOptions)
        super().__init__(blends, base_dir, rows=own.max_batch_size, queue=own.max_queue)
        self._options, self._own = options, own
        self._loaded: LlamaModel | None = None

    async def open(self, report: Report) -> None:
        self._begin(await in_daemon_thread(lambda: self._load(report)))

    def _load(self, report: Report) -> Running:
        from model_compose.engines.llamacpp.batch import Batch
        from model_compose.engines.llamacpp.llama import Llama, import_llama_cpp
        from model_compose.engines.llamacpp.loading import kv_bytes_per_token, read, room, settings
        from model_compose.engines.stepping.grammar import Grammars

        import_llama_cpp()  # fails if it is not installed, before anything is fetched
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
            if eos:  # read the vocabulary now; later, this would block all other threads
                grammars.start(ResponseFormat("json_object"))
        except BaseException:
            llama.close()
            raise
        batch = Batch(llama, max_rows=self._own.max_batch_size, tokens_per_step=self._own.n_batch)
        self._loaded = LlamaModel(llama, batch, token_bytes)

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
    """Convert the adapter to GGUF and load it. Raises AdapterError."""
    from model_compose.lora.gguf import write_gguf

    with tempfile.TemporaryDirectory(prefix="model-compose-") as folder:
        file = Path(folder) / "adapter.gguf"
        write_gguf(adapter, base.architecture, file)
        llama.load_adapter(key, adapter, file)
