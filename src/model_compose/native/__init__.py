"""A decode step on a CPU, in C: compiled for this machine where it has a C compiler (decode.c and what it includes).

Everything has a way without it. What is compiled is kept in the user's cache (compiling.py). MODEL_COMPOSE_NATIVE=0 in
the environment turns it off.
"""

import ctypes
import functools
import logging
import os
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model_compose.native.compiling import find_compiler, load_compiled

log = logging.getLogger(__name__)

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
"""What vectors.h calls the formats; two 4-bit weights are one uint8."""

GROUP = 32
"""Inputs that share a scale: of 4-bit weights, and of the activations that meet integers."""

FEW = 96
"""Up to so many tokens a call here takes less than torch's operations, which are made for many."""

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
        ("norm", _P), ("mlp_norm", _P), ("qk_norm", _P), ("window", _N),
        ("qkv", CProjection), ("out", CProjection), ("gate_up", CProjection), ("down", CProjection),
    )  # fmt: skip


class CShape(ctypes.Structure):
    _fields_ = (("heads", _N), ("groups", _N), ("dim", _N), ("eps", _F), ("scaling", _F))


class CRun(ctypes.Structure):
    _fields_ = (
        ("at", _N), ("count", _N), ("first", _N), ("capacity", _N), ("kind", _N),
        ("starts", _P), ("keys", _P), ("values", _P),
    )  # fmt: skip


@dataclass(frozen=True)
class Affine:
    """x Wᵀ + bias. weight: (out, in) float32 or bfloat16; int8 (out, in), filled up with zeros to whole groups; or 4 bits,
    (out, in / 2) uint8.

    scales, float32: (out) for int8; (2, out, in / GROUP) for 4 bits: of each group of inputs the scales s, and the offsets
    z in w = q · s + z. Byte i of a group's 16 holds q of its input i in the low half and of i + 16 in the high one. bias:
    float32.
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
    """The functions of decode.c. Tensors are contiguous, on the CPU, and float32 where nothing else is said."""

    def __init__(self, path: Path) -> None:
        self._scratch = threading.local()
        library = ctypes.CDLL(str(path))  # lets other threads of Python run meanwhile
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
        """W as float32, (out, in), until this thread's next call: fresh memory would cost more than the work."""
        size = len(affine.weight) * affine.inputs
        if getattr(self._scratch, "size", 0) < size:
            self._scratch.size, self._scratch.memory = size, torch.empty(size)
        wide: Tensor = self._scratch.memory[:size].view(-1, affine.inputs)
        self._expand(ctypes.byref(affine.c), wide.data_ptr())
        return wide

    def low_rank(self, x: Tensor, a: Tensor, v: Tensor, b: Tensor, y: Tensor) -> None:
        """y (tokens, out) += ((x Aᵀ) ⊙ v) B. x (tokens, in), a (rank, in), v (tokens, rank), b (rank, out)."""
        self._low_rank(
            x.data_ptr(), a.data_ptr(), v.data_ptr(), b.data_ptr(), y.data_ptr(), len(x), x.shape[1], len(a), y.shape[1]
        )

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """x += y, in place; then x / √(mean x² + eps) · weight. x, y: (tokens, size)"""
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
        self, run: CRun, layer: int, shape: CShape, norms: Tensor | None, window: int | None, qkv: Tensor, cosine: Tensor,
        sine: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        """Attention of a run's tokens in one layer: rotates, stores their keys and values, attends.

        qkv: (tokens, (heads + 2 · groups) · dim) of the whole pass; cosine, sine: (tokens, dim), the sine of the first half
        negative; norms: (heads + groups, dim), of queries and keys; window: how far back they look; out: (tokens, heads ·
        dim).
        """
        self._attend(
            ctypes.byref(run), layer, ctypes.byref(shape), _pointer(norms), window or 0,
            qkv.data_ptr(), cosine.data_ptr(), sine.data_ptr(), out.data_ptr(),
        )  # fmt: skip

    def decode(
        self, layers: "ctypes.Array[CLayer]", scales: Sequence[Tensor], runs: Sequence[CRun], shape: CShape, turn: tuple[
        Tensor, Tensor], norm: Tensor, x: Tensor,
    ) -> Tensor:  # fmt: skip
        """All layers of a step whose tokens are one of each row, and the last norm: (tokens, size).

        scales: each (tokens, rank), for a stack of the layout of this number; turn: cosine and sine, as above; x: (tokens,
        size), the embeddings, which are overwritten.
        """
        out = torch.empty_like(x)
        pointers = (_P * len(scales))(*(v.data_ptr() for v in scales))
        self._decode(
            layers, len(layers), pointers, (CRun * len(runs))(*runs), len(runs), ctypes.byref(shape), turn[0].data_ptr(),
            turn[1].data_ptr(), norm.data_ptr(), x.data_ptr(), out.data_ptr(), len(x),
        )  # fmt: skip
        return out


def _function(function: "ctypes._NamedFuncPointer", *types: type) -> "ctypes._NamedFuncPointer":
    function.argtypes, function.restype = types, None
    return function


@functools.cache
def kernels() -> Kernels | None:
    """Compiled on first use; None where there is no compiler, or it fails."""
    if os.environ.get("MODEL_COMPOSE_NATIVE") == "0":
        return None
    try:
        compiler = find_compiler()
        return load_compiled(compiler, Kernels) if compiler else None
    except (OSError, ValueError, subprocess.SubprocessError, AttributeError) as error:
        log.info("no compiled kernels, torch's serve as well (%s)", str(error).strip().splitlines()[:1])
        return None
