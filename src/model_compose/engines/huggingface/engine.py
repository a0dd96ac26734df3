"""The embedded engine (`driver:

huggingface`): transformers' models in this process, with any blend for each request.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from model_compose.daemon import in_daemon_thread
from model_compose.engines import Stats
from model_compose.engines.huggingface.memory import needs, open_cache
from model_compose.engines.huggingface.options import HuggingfaceOptions, refuse
from model_compose.engines.options import AdapterOptions, ModelOptions
from model_compose.engines.prompts import Prompts
from model_compose.engines.stepping.engine import Running, SteppingEngine
from model_compose.errors import Conflict, InputError, LoadError
from model_compose.generation import Request, ResponseFormat
from model_compose.lora.adapter import LoraAdapter
from model_compose.lora.blend import Blend, Blends
from model_compose.progress import Progress, Report
from model_compose.schema import Options

if TYPE_CHECKING:
    from model_compose.engines.huggingface.batch import Batch
    from model_compose.engines.huggingface.cache import KVCache
    from model_compose.engines.huggingface.loading import LoadedModel


class HuggingfaceEngine(SteppingEngine):
    """Runs a transformers model. Requests with different blends share one batch."""

    Options: ClassVar[type[Options]] = HuggingfaceOptions
    needs = staticmethod(needs)
    refuse = staticmethod(refuse)

    @classmethod
    def preflight(cls, options: ModelOptions, adapters: Mapping[str, LoraAdapter], base_dir: Path) -> None:
        """Checks nothing: the common checks of the base's and the adapters' files are enough for this driver."""

    def __init__(self, options: ModelOptions, blends: Blends, base_dir: Path) -> None:
        own = options.options
        assert isinstance(own, HuggingfaceOptions)
        super().__init__(blends, base_dir, rows=own.max_batch_size, queue=own.max_queue)
        self._options, self._own, self._blends = options, own, blends
        self._loaded: LoadedModel | None = None
        self._batch: Batch | None = None
        self._cache: KVCache | None = None

    async def open(self, report: Report) -> None:
        self._begin(await in_daemon_thread(lambda: self._load(report)))

    def _load(self, report: Report) -> Running:
        import torch

        from model_compose.engines.devices import free_memory
        from model_compose.engines.huggingface.batch import Batch
        from model_compose.engines.huggingface.loading import load, placement
        from model_compose.engines.stepping.grammar import Grammars

        own = self._own
        loaded = load(self._options, self._base_dir, report, max_adapters=own.max_adapters_on_device)
        for blend in self._blends.full_rank:
            _fold_ahead(loaded, blend, report)
        # Folding in fewer than 32 bits would round small deltas away. A fold needs a second copy of the weights it
        # changes.
        auto = own.fold == "auto" and loaded.dtype == torch.float32 and self._options.quantization is None
        free = free_memory(loaded.device)
        auto = auto and (free is None or 2 * loaded.lora.fold_bytes(self._blends.default) < free)
        if (own.fold == "always" or auto) and self._blends.default.active:
            loaded.lora.fold(self._blends.default)
        cache, context = open_cache(loaded.forward.layers, loaded.device, loaded.context, own)
        grammars = Grammars(loaded.tokenizer, loaded.vocabulary, loaded.eos)
        if loaded.eos:  # reads the vocabulary now, since this would block all other threads later
            grammars.start(ResponseFormat("json_object"))
        batch = Batch(
            loaded.lora, loaded.forward, cache, max_rows=own.max_batch_size, prefix_cache=own.prefix_cache,
            auto_fold=auto, max_adapters=own.max_adapters_on_device,
        )  # fmt: skip
        self._loaded, self._batch, self._cache = loaded, batch, cache

        def attach(adapter: LoraAdapter, key: str, options: AdapterOptions | None) -> None:
            loaded.lora.load(adapter, *([placement(options)] if options else []), key=key)

        return Running(
            Prompts(loaded.tokenizer, context), loaded.vocabulary, loaded.eos, loaded.identity, grammars, batch,
            lambda: loaded.lora.adapters, attach,
        )  # fmt: skip

    def stats(self) -> Stats | None:
        loaded, batch, loop, cache = self._loaded, self._batch, self._loop, self._cache
        if loaded is None or batch is None or loop is None or cache is None:
            return None
        present = loop.running  # a tuple: the engine's thread may replace it meanwhile
        done = sum(sequence.done for sequence in present)
        running = sum(batch.computes(sequence) and not sequence.done for sequence in present)
        prefixes = batch.prefixes
        return Stats(
            running=running,
            waiting=max(0, loop.load - done - running) + self.room.promised,
            kv_cache_used=cache.spent - (prefixes.size if prefixes else 0),  # prefixes are dropped when needed
            kv_cache_total=cache.budget,
            kv_cache_prefixes=prefixes.size if prefixes else 0,
            prefix_queries=prefixes.queries if prefixes else 0,
            prefix_hits=prefixes.hits if prefixes else 0,
            preemptions=batch.preemptions,
            adapters=len(loaded.lora.names),
        )

    async def load_adapter(self, options: AdapterOptions, report: Report) -> None:
        if self._own.fold == "always":
            raise Conflict(
                "this model has its default blend folded in (options.fold: always) and takes no other adapter"
            )
        await super().load_adapter(options, report)

    async def close(self) -> None:
        await super().close()
        self._batch = self._cache = self._loaded = None

    def _check(self, request: Request) -> None:
        if request.blend.full_rank and not any(request.blend.equals(blend) for blend in self._blends.full_rank):
            raise InputError(
                f"the blend {request.blend.described} has full rank and runs folded into the weights only, in a copy that "
                "is made when the model loads; put it under the file's 'blends'",
                field="blend",
            )
        if self._own.fold == "always" and not request.blend.equals(self._blends.default):
            raise InputError(
                "this model has its default blend folded in (options.fold: always) and takes no other; leave 'blend' out, "
                "or set fold: never",
                field="blend",
            )


def _fold_ahead(loaded: "LoadedModel", blend: Blend, report: Report) -> None:
    """Computes the weights of a blend of full rank and keeps them, so that a request for it only swaps them in.

    Raises LoadError.
    """
    from model_compose.engines.devices import size_text

    lora, which = loaded.lora, f"the blend {blend.described}"
    if not lora.can_fold(blend):
        raise LoadError(f"{which} runs folded only, and this base is quantised, which is never folded; use method: svd")
    report(Progress(f"folding {which}", 0, 1, "blends"))
    try:
        lora.fold(blend)
    except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError if there is no memory
        size = size_text(lora.fold_bytes(blend))
        raise LoadError(
            f"no memory for {which}, whose weights take {size} besides the base's; use method: svd"
        ) from error
    lora.unfold(keep=True)
    report(Progress(f"folding {which}", 1, 1, "blends"))
