"""native.c, compiled for this machine where it has a C compiler: the products, norms and attention of a step of few tokens.

Everything has a way without it. What is compiled is kept in the user's cache, named by source, flags and processor.
MODEL_COMPOSE_NATIVE=0 in the environment turns it off.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
"""What native.c calls the weights' formats; two 4-bit weights are one uint8."""

FEW = 64
"""Up to so many tokens a product is faster here than by torch, which is made for many."""


@dataclass(frozen=True)
class Weight:
    """A Linear's weight: (out, in) float32, bfloat16 or int8, or (out, in / 2) uint8 for 4 bits.

    scales, float32: (out) for int8; (out, in / 32, 2) for 4 bits, of each group of inputs the scale s and the offset z in
    w = q · s + z. Byte i of a group's 16 holds q of its input i in the low half and of i + 16 in the high one.
    """

    data: Tensor
    scales: Tensor | None = None

    @property
    def inputs(self) -> int:
        return self.data.shape[1] * (2 if self.data.dtype == torch.uint8 else 1)


class Kernels:
    """The functions of native.c. Tensors are contiguous, on the CPU, and float32 where nothing else is said."""

    def __init__(self, path: Path) -> None:
        p, n, f = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
        # What takes microseconds keeps Python's lock: to let another thread in between would cost more.
        long, short = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        self._scratch = threading.local()
        long.use_threads(n(torch.get_num_threads()))
        self._linear = _function(long.linear, n, p, p, p, p, p, n, n, n)
        self._expand = _function(long.expand, n, p, p, p, n, n)
        self._attend = _function(long.attend, p, p, p, p, f, p, p, n, n, p, n, f, p, n, n, n, n)
        self._low_rank = _function(short.low_rank, p, p, p, p, p, n, n, n, n, f)
        self._add_norm = _function(short.add_norm, p, p, p, p, n, n, f)
        self._silu_mul = _function(short.silu_mul, p, p, n, n)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias: (tokens, in) -> (tokens, out)."""
        data = weight.data
        y = torch.empty(len(x), len(data))
        self._linear(
            KINDS[data.dtype], data.data_ptr(), _pointer(weight.scales), _pointer(bias), x.data_ptr(), y.data_ptr(),
            len(x), len(data), x.shape[1],
        )  # fmt: skip
        return y

    def expand(self, weight: Weight) -> Tensor:
        """The weight as float32, (out, in), until this thread's next call: fresh memory would cost more than the work."""
        data = weight.data
        size = len(data) * weight.inputs
        if getattr(self._scratch, "size", 0) < size:
            self._scratch.size, self._scratch.memory = size, torch.empty(size)
        wide: Tensor = self._scratch.memory[:size].view(len(data), weight.inputs)
        self._expand(
            KINDS[data.dtype], data.data_ptr(), _pointer(weight.scales), wide.data_ptr(), len(data), weight.inputs
        )
        return wide

    def low_rank(self, x: Tensor, a: Tensor, v: Tensor, b: Tensor, y: Tensor, alpha: float) -> None:
        """y (tokens, out) += alpha · ((x Aᵀ) ⊙ v) B. x (tokens, in), a (rank, in), v (tokens, rank), b (rank, out)."""
        self._low_rank(
            x.data_ptr(), a.data_ptr(), v.data_ptr(), b.data_ptr(), y.data_ptr(),
            len(x), x.shape[1], len(a), y.shape[1], alpha,
        )  # fmt: skip

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
        self, qkv: Tensor, cosine: Tensor, sine: Tensor, norms: Tensor | None, eps: float, keys: Tensor, values: Tensor,
        starts: Tensor, window: int | None, scaling: float, out: Tensor,
    ) -> None:  # fmt: skip
        """One new token for each of neighbouring rows of the KV cache: rotates, stores its key and value, attends.

        qkv: (tokens, heads · dim + 2 · groups · dim); cosine, sine: (tokens, dim), the sine of the first half negative;
        norms: (heads + groups, dim), of queries and keys; keys, values: (tokens, groups, capacity, dim), float32 or
        bfloat16; starts: (tokens) int64, what each row has cached; window: how far back it looks; out: (tokens,
        heads · dim).
        """
        _, groups, capacity, dim = keys.shape
        self._attend(
            qkv.data_ptr(), cosine.data_ptr(), sine.data_ptr(), _pointer(norms), eps, keys.data_ptr(), values.data_ptr(),
            KINDS[keys.dtype], capacity, starts.data_ptr(), window or 0, scaling, out.data_ptr(),
            len(qkv), out.shape[1] // dim, groups, dim,
        )  # fmt: skip


def _function(function: "ctypes._NamedFuncPointer", *types: type) -> "ctypes._NamedFuncPointer":
    function.argtypes, function.restype = types, None
    return function


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def kernels() -> Kernels | None:
    """Compiled on first use; None where there is no compiler, or it fails."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("MODEL_COMPOSE_NATIVE") == "0" or compiler is None:
        return None
    try:
        return Kernels(_compiled(compiler))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        told = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        log.info("no compiled kernels, torch's serve as well (%s)", told.strip().splitlines()[:1])
        return None


def _compiled(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    parts = (SOURCE.read_bytes(), " ".join(FLAGS).encode(), version, _processor().encode())
    name = f"native-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "model-compose"
    path = folder / name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # beside it, so that the rename is one step
            made = Path(scratch) / name
            command = [compiler, *FLAGS, "-o", str(made), str(SOURCE), "-lm"]
            subprocess.run(command, capture_output=True, check=True, text=True, timeout=120)
            made.replace(path)
    return path


def _processor() -> str:
    """What -march=native looks at: a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
