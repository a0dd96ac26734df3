"""Native code where the system gives it nothing more, and where Python and C do not agree on a struct."""

import ctypes
import logging
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model_compose import native
from model_compose.engines.huggingface.quantized import NativeLinear, quantize
from model_compose.native import (
    CAffine,
    CCacheRows,
    CHeads,
    CLayer,
    CProjection,
    CStack,
    Kernels,
    StructMismatch,
    kernels,
)
from model_compose.native.compiling import find_compiler, load_compiled

pytestmark = pytest.mark.skipif(kernels() is None, reason="no C compiler")

HEADS, KEY_HEADS, SIZE, INNER, CAPACITY, TOKENS = 4, 2, 16, 96, 8, 3
WIDTH, QKV = HEADS * SIZE, (HEADS + 2 * KEY_HEADS) * SIZE


class Step:
    """One layer's weights and rows, for calls that change `x` and the cache. Every call starts from the same numbers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = {"qkv": (WIDTH, QKV), "out": (WIDTH, WIDTH), "gate_up": (WIDTH, 2 * INNER), "down": (INNER, WIDTH)}
        self.affines = {name: quantize("int8", nn.Linear(*size)) for name, size in sizes.items()}
        self.a, self.b, self.v = torch.randn(5, WIDTH), torch.randn(5, QKV), torch.randn(TOKENS, 5)
        self.norm, self.cosine, self.sine = torch.rand(WIDTH), torch.randn(TOKENS, SIZE), torch.randn(TOKENS, SIZE)
        self.kept = torch.randn(2, TOKENS, KEY_HEADS, CAPACITY, SIZE)
        self.cached = torch.tensor([0, 3, 6])
        self.x, self.qkv, self.much = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, QKV), torch.randn(96, 2048)

    def affine(self, name: str) -> native.Affine:
        module = self.affines[name]
        assert isinstance(module, NativeLinear)
        return module.affine

    def run(self, kernels: Kernels, name: str) -> list[Tensor]:
        """What the call of this name gives and what it changes."""
        self.changed = [self.x.clone(), self.kept.clone(), torch.zeros(TOKENS, QKV), torch.zeros(TOKENS, WIDTH)]
        x, kept, added, attended = self.changed
        pointers = [(ctypes.c_void_p * 1)(part.data_ptr()) for part in kept]
        rows = CCacheRows(0, TOKENS, 0, CAPACITY, 0, self.cached.data_ptr(), *map(ctypes.addressof, pointers))
        heads = CHeads(HEADS, KEY_HEADS, SIZE, 1e-5, SIZE**-0.5)
        if name == "linear":
            return [kernels.linear(self.x, self.affine("qkv"))]
        if name == "expand":
            return [kernels.expand(self.affine("qkv")).clone()]
        if name == "low_rank":
            kernels.low_rank(
                self.much[:, :WIDTH].contiguous(), self.a, self.v.repeat(32, 1), self.b, added.repeat(32, 1)
            )
            kernels.low_rank(self.x, self.a, self.v, self.b, added)
        elif name == "add_norm":
            return [kernels.add_norm(self.much.clone(), self.much, torch.rand(2048).fill_(0.5), 1e-5)]
        elif name == "silu_mul":
            return [kernels.silu_mul(self.much)]
        elif name == "attend":
            kernels.attend(rows, 0, heads, None, None, self.qkv, self.cosine, self.sine, attended)
        else:
            stack = CStack(self.a.data_ptr(), self.b.data_ptr(), len(self.a), 0)
            affines = {name: self.affine(name) for name in self.affines}
            parts = [CProjection(part.c, stack if name == "qkv" else CStack()) for name, part in affines.items()]
            layers = (CLayer * 1)(CLayer(self.norm.data_ptr(), self.norm.data_ptr(), None, 0, *parts))
            turn = (self.cosine, self.sine)
            return [kernels.decode(layers, [self.v], [rows], heads, turn, self.norm, x), *self.changed]
        return self.changed


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kernels, ctypes.CDLL]:
    """The kernels with what they take of the system counted, and the library to refuse it."""
    compiler = find_compiler()
    assert compiler is not None
    header = str(Path(__file__).parent / "counted.h")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        made, library = load_compiled(
            [*compiler, "-include", header], lambda path: (Kernels(path), ctypes.CDLL(str(path)))
        )
    library.use_threads(ctypes.c_long(3))
    return made, library


@pytest.mark.parametrize("name", ["linear", "expand", "low_rank", "add_norm", "silu_mul", "attend", "decode"])
def test_no_memory_or_threads_is_a_memory_error(name: str, counted: tuple[Kernels, ctypes.CDLL]) -> None:
    """Whatever is refused: nothing leaks, nothing has changed, and the next call works."""
    made, library = counted
    taken, held = (ctypes.c_long.in_dll(library, symbol) for symbol in ("taken", "held"))
    step = Step()

    def in_new_thread(number: int) -> list[Tensor]:
        """The call, after it was refused the piece of this number: by a thread that has no team yet."""

        def run() -> list[Tensor]:
            before = [step.x.clone(), step.kept.clone()]
            library.refuse(ctypes.c_long(number))
            if number >= 0:
                with pytest.raises(MemoryError, match=r"the system has no (memory|threads) for a call of native code"):
                    step.run(made, name)
                assert held.value == 0
                assert all(map(torch.equal, step.changed[:2], before))
                library.refuse(ctypes.c_long(-1))
            found = step.run(made, name)
            assert held.value == 0
            return found

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run).result()

    wanted = in_new_thread(-1)
    pieces = taken.value
    assert pieces >= 3  # two threads, and the list of them
    for number in range(pieces):
        assert all(map(torch.equal, in_new_thread(number), wanted))


CHILD = """
import resource, torch
torch.set_num_threads(3)
from model_compose.native import Affine, kernels

def limited(more, call):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, -1))
    try:
        call()
    except MemoryError as error:
        print(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

made = kernels()
x, weight = torch.ones(8, 200_000), torch.ones(2, 200_000, dtype=torch.bfloat16)
small = torch.ones(200, 1024)
calls = [lambda: made.silu_mul(small), lambda: made.linear(x, Affine(weight, 200_000))]
for more, call in zip((1 << 20, 4 << 20), calls):
    limited(more, call)
    call()
print(made.linear(x, Affine(weight, 200_000)).unique().tolist())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS bounds a process on Linux")
def test_a_process_without_memory_goes_on() -> None:
    """The kernel itself refuses a thread's stack, then memory."""
    ran = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [
        "the system has no threads for a call of native code (silu_mul)",
        "the system has no memory for a call of native code (linear)",
        "[200000.0]",
    ]


class Longer(ctypes.Structure):
    _fields_ = (*CAffine._fields_, ("new", ctypes.c_int64))


class Turned(ctypes.Structure):
    _fields_ = (("heads", ctypes.c_int32), *CHeads._fields_[1:-1], ("scaling", ctypes.c_double))


class Shorter(ctypes.Structure):
    _fields_ = CStack._fields_[:-1]


@pytest.mark.parametrize(("name", "struct"), [("affine", Longer), ("heads", Turned), ("stack", Shorter)])
def test_structs_that_do_not_match_are_refused(
    name: str, struct: type[ctypes.Structure], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if there were no compiler, but with a warning: it is our own fault."""
    load: Callable[[], Kernels | None] = kernels.__wrapped__
    assert load() is not None
    monkeypatch.setitem(native.STRUCTS, name, struct)
    with caplog.at_level(logging.WARNING):
        assert load() is None
    assert f"the compiled kernels keep the struct '{name}' in another way" in caplog.text
    compiler = find_compiler()
    assert compiler is not None
    with pytest.raises(StructMismatch):
        load_compiled(compiler, Kernels)
