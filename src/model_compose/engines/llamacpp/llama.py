"""llama.cpp in this process, through the C functions that llama-cpp-python wraps: a model, its context and its adapters.

A context has numbered rows; each holds the keys and values of one text. Only one thread may use these objects at a time.
"""

import ctypes
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_compose.errors import AdapterError, LoadError
from model_compose.lora.adapter import LoraAdapter
from model_compose.progress import Progress, Report

log = logging.getLogger(__name__)

REQUIRED = "'llama-cpp-python>=0.3.36'"


@dataclass(frozen=True)
class Attached:
    """An adapter, with llama.cpp's pointer to its loaded copy."""

    adapter: LoraAdapter
    pointer: Any


@dataclass(frozen=True)
class Settings:
    """cells: the most tokens in all rows together. rows: the number of rows. gpu_layers: -1 means all. kv_float32: whether
    keys and values are float32; else they are float16. flash_attention: None lets llama.cpp decide."""

    cells: int
    rows: int
    tokens_per_step: int
    threads: int
    gpu_layers: int
    kv_float32: bool
    flash_attention: bool | None

    @property
    def ubatch(self) -> int:
        """The most tokens that llama.cpp computes at once. Its buffers grow with this number."""
        return min(512, self.tokens_per_step)


@dataclass(frozen=True)
class Piece:
    """Tokens to compute for one row, which holds `start` tokens already."""

    row: int
    tokens: Collection[int]
    start: int


class Llama:
    """A model with its context. vocabulary: the width of the logits. eos: the tokens that end a text. cells: the most
    tokens in all rows together.

    Raises LoadError with llama.cpp's reason.
    """

    def __init__(self, file: Path, settings: Settings, report: Report) -> None:
        self._lib = import_llama_cpp()
        self._used: dict[str, float] | None = None
        self.adapters: dict[str, Attached] = {}
        """The loaded adapters, by the callers' keys."""
        self._model = self._context = self._batch = None
        lib = self._lib
        try:
            self._model = self._load(file, settings.gpu_layers, report)
            self._context = self._open(file, settings)
            self._memory = lib.llama_get_memory(self._context)
            self._batch = lib.llama_batch_init(settings.tokens_per_step, 0, 1)
        except BaseException:
            self.close()
            raise
        vocabulary = lib.llama_model_get_vocab(self._model)
        self.vocabulary = int(lib.llama_vocab_n_tokens(vocabulary))
        ends = (lib.llama_vocab_eos(vocabulary), lib.llama_vocab_eot(vocabulary))
        self.eos = tuple(sorted({token for token in ends if token >= 0}))
        self.cells = int(lib.llama_n_ctx(self._context))
        self.can_copy = not lib.llama_model_is_recurrent(self._model) and not lib.llama_model_is_hybrid(self._model)
        """Whether the beginning of a row can be copied to another row. A recurrent state cannot be cut at a token."""

    def _load(self, file: Path, gpu_layers: int, report: Report) -> Any:
        lib, reported = self._lib, [-1]

        @lib.llama_progress_callback  # type: ignore[untyped-decorator]
        def progress(share: float, _: object) -> bool:
            if (percent := int(share * 100)) > reported[0]:
                reported[0] = percent
                report(Progress("loading weights", percent, 100, "%"))
            return True

        params = lib.llama_model_default_params()
        params.n_gpu_layers, params.progress_callback = gpu_layers, progress
        errors.clear()
        model = lib.llama_model_load_from_file(str(file).encode(), params)
        if not model:
            raise LoadError(f"llama.cpp cannot load {file}: {_reason()}")
        return model

    def _open(self, file: Path, settings: Settings) -> Any:
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = settings.cells, settings.rows, True
        params.n_batch, params.n_ubatch = settings.tokens_per_step, settings.ubatch
        params.n_outputs_max = settings.rows  # one for each piece; by default, buffers hold logits for the whole batch
        params.n_threads = params.n_threads_batch = settings.threads
        params.type_k = params.type_v = lib.GGML_TYPE_F32 if settings.kv_float32 else lib.GGML_TYPE_F16
        params.flash_attn_type = {None: -1, False: 0, True: 1}[settings.flash_attention]
        params.offload_kqv = params.op_offload = settings.gpu_layers != 0
        errors.clear()
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise LoadError(
                f"llama.cpp cannot open a context of {settings.cells} tokens for {file}: {_reason()}; set a smaller "
                "max_context or kv_cache"
            )
        return context

    def load_adapter(self, key: str, adapter: LoraAdapter, file: Path) -> None:
        """Read a GGUF adapter into memory; the file is not needed afterwards. Raises AdapterError."""
        errors.clear()
        pointer = self._lib.llama_adapter_lora_init(self._model, str(file).encode())
        if not pointer:
            raise AdapterError(f"adapter '{adapter.name}': llama.cpp does not take it: {_reason()}")
        self.adapters[key] = Attached(adapter, pointer)

    def free_adapter(self, key: str) -> None:
        """Free a loaded adapter, and stop using all adapters."""
        # Clear the context's adapters first: it may point to this one, whose memory another adapter could get.
        self.use({})
        self._lib.llama_adapter_lora_free(self.adapters.pop(key).pointer)

    def use(self, weights: Mapping[str, float]) -> None:
        """Set the adapters, by key, and their weights for the following passes. llama.cpp then adds Σ w · B (A x)."""
        if weights == self._used:
            return
        count = len(weights)
        adapters = (self._lib.llama_adapter_lora_p_ctypes * count)(*(self.adapters[key].pointer for key in weights))
        self._used = None
        self._lib.llama_set_adapters_lora(self._context, adapters, count, (ctypes.c_float * count)(*weights.values()))
        self._used = dict(weights)

    def compute(self, pieces: Collection[Piece]) -> Tensor:
        """Make one pass. Returns the logits after the last token of each piece, (pieces, vocabulary) in float32.

        Raises RuntimeError; the rows then have the same content as before.
        """
        batch, number, last = self._batch, 0, []
        assert batch is not None
        for piece in pieces:
            for position, token in enumerate(piece.tokens, piece.start):
                batch.token[number], batch.pos[number] = token, position
                batch.n_seq_id[number], batch.seq_id[number][0] = 1, piece.row
                batch.logits[number] = 0
                number += 1
            batch.logits[number - 1] = 1
            last.append(number - 1)
        batch.n_tokens = number
        errors.clear()
        code = self._lib.llama_decode(self._context, batch)
        if code != 0:
            for piece in pieces:
                self.cut(piece.row, piece.start)
            raise RuntimeError(f"llama_decode returned {code}: {_reason()}")
        pointers = [self._lib.llama_get_logits_ith(self._context, index) for index in last]
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(each, (self.vocabulary,)) for each in pointers]))

    def copy(self, source: int, row: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of a row to an empty row. The two rows share the cells."""
        self._lib.llama_memory_seq_cp(self._memory, source, row, 0, tokens)

    def cut(self, row: int, tokens: int) -> None:
        """Remove all tokens of a row after the first `tokens`."""
        self._lib.llama_memory_seq_rm(self._memory, row, tokens, -1)

    def close(self) -> None:
        """Free everything. The object cannot be used afterwards."""
        if self._batch is not None:
            self._lib.llama_batch_free(self._batch)
        if self._context is not None:
            self._lib.llama_free(self._context)
        if self._model is not None:
            self._lib.llama_model_free(self._model)  # with its adapters
        self._model = self._context = self._batch = None


errors: list[str] = []
"""The error lines in llama.cpp's log since this list was last cleared. llama.cpp's functions return no reasons."""

_callback: Any = None


def import_llama_cpp() -> Any:
    """The module llama_cpp, whose log goes to ours from now on. Raises LoadError if it is missing or too old."""
    global _callback
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise LoadError(
            f"driver llamacpp needs llama-cpp-python, which is not installed; pip install {REQUIRED} (this compiles for "
            "some minutes; its documentation lists prebuilt wheels and builds for GPUs)"
        ) from None
    except (OSError, RuntimeError) as error:
        raise LoadError(f"llama-cpp-python cannot be imported ({error}); install it again") from error
    if "llama_set_adapters_lora" not in vars(llama_cpp):
        raise LoadError(
            f"llama-cpp-python {llama_cpp.__version__} is too old for driver llamacpp; pip install {REQUIRED}"
        )
    if _callback is None:
        _callback = llama_cpp.llama_log_callback(_log)
        llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
    return llama_cpp


def _log(level: int, text: bytes, _: object) -> None:
    """Handle a line of llama.cpp's log. Errors are kept for the exceptions that follow; all lines are logged at DEBUG."""
    line = text.decode("utf-8", "replace").strip()
    if level == 3:  # GGML_LOG_LEVEL_ERROR
        errors.append(line)
    if line.strip("."):
        log.debug("%s", line)


def _reason() -> str:
    """The first error, without the name of the C function that logged it."""
    return errors[0].partition(": ")[2] or errors[0] if errors else "it gave no reason"
