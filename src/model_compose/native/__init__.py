"""A decode step on a CPU, in C (decode.c and the files it includes), compiled on this machine where it has a C compiler.

Everything that is done here can also be done by torch. compiling.py keeps the compiled library in the user's cache.
MODEL_COMPOSE_NATIVE=0 in the environment turns native code off.
"""

import ctypes
import functools
import logging
import os
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_compose.native.compiling import find_compiler, load_compiled

log = logging.getLogger(__name__)

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
"""The numbers that vectors.h gives to the ways of storing weights. uint8 holds two 4-bit weights in a byte."""

GROUP = 32
"""How many inputs share a scale: in 4-bit weights, and in inputs that are rounded for integer weights."""

FEW = 96
"""Up to this many tokens, a call here takes less time than torch's operations, which are made for many tokens."""

_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class CAffine(ctypes.Structure):
    _fields_ = (("kind", _N), ("outputs", _N), ("inputs", _N), ("weight", _P), ("scales", _P), ("bias", _P))


class CStack(ctypes.Structure):
    _fields_ = (("a", _P), ("b", _P), ("rank", _N), ("layout", _N))


class CProjection(ctypes.Structure):
    _fields_ = (("base", CAffine), ("adapters", CStack))


class CLayer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", _P), ("mlp_norm", _P), ("qk_norm", _P), ("window", _N),
        ("qkv", CProjection), ("out", CProjection), ("gate_up", CProjection), ("down", CProjection),
    )  # fmt: skip


class CHeads(ctypes.Structure):
    _fields_ = (("heads", _N), ("key_heads", _N), ("size", _N), ("eps", _F), ("scaling", _F))


class CCacheRows(ctypes.Structure):
    _fields_ = (
        ("first_token", _N), ("count", _N), ("first_row", _N), ("capacity", _N), ("kind", _N),
        ("cached", _P), ("keys", _P), ("values", _P),
    )  # fmt: skip


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "affine": CAffine,
    "stack": CStack,
    "projection": CProjection,
    "layer": CLayer,
    "heads": CHeads,
    "cache_rows": CCacheRows,
}
"""Our copies of the structs in C. The C files explain the fields. decode.c exports `layout_of_` each name."""


class StructMismatch(Exception):
    """A compiled library keeps a struct in another way than this module, so calling it would read wrong memory."""


@dataclass(frozen=True)
class Affine:
    """x Wᵀ + bias, with W as it is stored.

    weight: (out, in) float32 or bfloat16; or (out, in) int8, where each row is filled up with zeros to whole groups; or
    (out, in / 2) uint8, two 4-bit numbers in a byte. Byte i of a group's 16 holds the group's input i in its low half
    and input i + 16 in its high half.

    scales: float32. For int8 (out): w = number · scale. For 4 bits (2, out, in / GROUP): the groups' scales, then their
    offsets: w = number · scale + offset. bias: float32 (out).
    """

    weight: Tensor
    inputs: int
    scales: Tensor | None = None
    bias: Tensor | None = None

    @property
    def c(self) -> CAffine:
        kind, weight = KINDS[self.weight.dtype], self.weight
        return CAffine(kind, len(weight), self.inputs, weight.data_ptr(), _pointer(self.scales), _pointer(self.bias))


class Kernels:
    """The functions of decode.c. Tensors are contiguous, on the CPU, and float32 unless something else is said.

    Each function raises MemoryError if the system has no memory or no threads for it. Then it has changed nothing.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError, ValueError or AttributeError if the file is no such library; StructMismatch."""
        self._scratch = threading.local()
        library = ctypes.CDLL(str(path))  # other Python threads run while a function of this library does
        for name, struct in STRUCTS.items():
            _check_layout(library, name, struct)
        library.use_threads(ctypes.c_long(torch.get_num_threads()))
        self._linear = _function(library.linear, _P, _P, _P, _N)
        self._expand = _function(library.expand, _P, _P)
        self._low_rank = _function(library.low_rank, _P, _P, _P, _P, _P, _N, _N, _N, _N)
        self._add_norm = _function(library.add_norm, _P, _P, _P, _P, _N, _N, _F)
        self._silu_mul = _function(library.silu_mul, _P, _P, _N, _N)
        self._attend = _function(library.attend, _P, _N, _P, _P, _N, _P, _P, _P, _P)
        self._decode = _function(library.decode, _P, _N, _P, _P, _N, _P, _P, _P, _P, _P, _P, _N)

    def linear(self, x: Tensor, affine: Affine) -> Tensor:
        """(tokens, in) -> (tokens, out)"""
        y = torch.empty(len(x), len(affine.weight))
        self._linear(ctypes.byref(affine.c), x.data_ptr(), y.data_ptr(), len(x))
        return y

    def expand(self, affine: Affine) -> Tensor:
        """W as float32 (out, in), from any other dtype.

        The result is valid until this thread's next call. Its memory is used again, since fresh memory would cost more
        time than the work.
        """
        size = len(affine.weight) * affine.inputs
        if getattr(self._scratch, "size", 0) < size:
            self._scratch.memory, self._scratch.size = torch.empty(size), size
        wide: Tensor = self._scratch.memory[:size].view(-1, affine.inputs)
        self._expand(ctypes.byref(affine.c), wide.data_ptr())
        return wide

    def low_rank(self, x: Tensor, a: Tensor, v: Tensor, b: Tensor, y: Tensor) -> None:
        """y (tokens, out) += ((x Aᵀ) ⊙ v) B. x (tokens, in), a (rank, in), v (tokens, rank), b (rank, out)."""
        self._low_rank(
            x.data_ptr(), a.data_ptr(), v.data_ptr(), b.data_ptr(), y.data_ptr(), len(x), x.shape[1], len(a), y.shape[1]
        )

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Adds y to x in place; then gives x / √(mean x² + eps) · weight. x, y: (tokens, size)"""
        out = torch.empty_like(x)
        self._add_norm(x.data_ptr(), _pointer(y), weight.data_ptr(), out.data_ptr(), len(x), x.shape[1], eps)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) · up: (tokens, 2 · size) -> (tokens, size)."""
        tokens, width = gate_up.shape
        out = torch.empty(tokens, width // 2)
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), tokens, width // 2)
        return out

    def attend(
        self, rows: CCacheRows, layer: int, heads: CHeads, norms: Tensor | None, window: int | None, qkv: Tensor,
        cosine: Tensor, sine: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        """Rotates the new tokens of these rows, stores their keys and values in the cache, and attends, in one layer.

        qkv: (tokens, (heads + 2 · key heads) · size) of the whole pass; cosine, sine: (tokens, size), the sine of the
        first half negative; norms: (heads + key heads, size), of queries and keys; window: how many tokens back a token
        looks; out: (tokens, heads · size).
        """
        self._attend(
            ctypes.byref(rows), layer, ctypes.byref(heads), _pointer(norms), window or 0,
            qkv.data_ptr(), cosine.data_ptr(), sine.data_ptr(), out.data_ptr(),
        )  # fmt: skip

    def decode(
        self, layers: "ctypes.Array[CLayer]", scales: list[Tensor], groups: list[CCacheRows], heads: CHeads, turn: tuple[
        Tensor, Tensor], norm: Tensor, x: Tensor,
    ) -> Tensor:  # fmt: skip
        """All layers of a step in which each row has one new token, and the last norm: (tokens, size).

        scales: v (tokens, rank) for each layout, in the order of the layouts' numbers in `layers`. turn: cosine and
        sine, as in `attend`. x: (tokens, size), the embeddings; they are overwritten.
        """
        out = torch.empty_like(x)
        pointers = (_P * len(scales))(*(v.data_ptr() for v in scales))
        self._decode(
            layers, len(layers), pointers, (CCacheRows * len(groups))(*groups), len(groups), ctypes.byref(heads),
            turn[0].data_ptr(), turn[1].data_ptr(), norm.data_ptr(), x.data_ptr(), out.data_ptr(), len(x),
        )  # fmt: skip
        return out


def _check_layout(library: ctypes.CDLL, name: str, struct: type[ctypes.Structure]) -> None:
    """Compares a struct's fields, size and offsets with those of the library. Raises StructMismatch."""
    fields = [getattr(struct, field[0]).offset for field in struct._fields_]
    count = _N.in_dll(library, f"layout_of_{name}").value
    theirs = list((_N * (count + 2)).in_dll(library, f"layout_of_{name}")) if count == len(fields) else [count]
    if theirs != [len(fields), ctypes.sizeof(struct), *fields]:
        raise StructMismatch(
            f"the compiled kernels keep the struct '{name}' in another way than Python does; this is a fault of this "
            "version of model-compose: decode.c and native/__init__.py do not match"
        )


def _function(function: "ctypes._NamedFuncPointer", *types: type) -> "ctypes._NamedFuncPointer":
    function.argtypes, function.restype, function.errcheck = types, ctypes.c_int, _check_result
    return function


def _check_result(result: Any, function: Any, _: Any) -> Any:
    """What ctypes calls after each function, with the code that it returned."""
    if result:
        missing = {1: "memory", 2: "threads"}[result]  # NO_MEMORY and NO_THREADS of memory.h
        raise MemoryError(f"the system has no {missing} for a call of native code ({function.__name__})")


@functools.cache
def kernels() -> Kernels | None:
    """The kernels, compiled on first use. None if there is no compiler, or it fails: torch does the same work then."""
    if os.environ.get("MODEL_COMPOSE_NATIVE") == "0":
        return None
    try:
        compiler = find_compiler()
        return load_compiled(compiler, Kernels) if compiler else None
    except StructMismatch as error:
        log.warning("native code is not used, torch computes instead: %s", error)
        return None
    except (OSError, ValueError, subprocess.SubprocessError, AttributeError) as error:
        log.info("native code could not be compiled, torch computes instead (%s)", str(error).strip().splitlines()[:1])
        return None
