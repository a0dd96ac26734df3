"""Which devices this machine has, what they can compute, and how many bytes they have free. Nothing here knows of
models."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from model_compose.errors import LoadError

if TYPE_CHECKING:
    import torch

UNLIMITED = 1 << 60
"""Control groups of version 1 write "no limit" as a huge number: from this one on, in bytes."""


KINDS = {"cpu": ("int8", "int4"), "cuda": ("int8", "nf4", "fp4")}
"""The quantizations for which each kind of device has kernels: our own on CPU, bitsandbytes' on CUDA."""

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def check_device(name: str) -> None:
    """Raise LoadError for a text that is not a device's name. Does not check whether this machine has the device."""
    if not _DEVICE.fullmatch(name):
        raise LoadError(f"device '{name}' is not known; use auto, cpu, cuda, cuda:0 or mps")


def check_quantization(kind: str | None, device: str) -> None:
    """Raise LoadError if the device has no kernels for this quantization."""
    device_type = device.partition(":")[0]
    kinds = KINDS.get(device_type, ())
    if kind is not None and kind not in kinds:
        use = f"on {device_type} use {' or '.join(kinds)}" if kinds else f"remove this option on {device_type}"
        raise LoadError(f"quantization: {kind} is not available on {device}; {use}")


class Devices:
    """The devices of this machine. `plan` has a subclass that pretends to have other devices."""

    def pick(self, name: str) -> "torch.device":
        """The torch device for a YAML value. Raises LoadError for one that does not exist."""
        return pick_device(name)

    def free(self, device: "torch.device") -> int | None:
        """The free bytes of the device; None if the system does not report them."""
        return free_memory(device)


def pick_device(name: str) -> "torch.device":
    """The torch device for a YAML value. Raises LoadError for one that this machine does not have."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    check_device(name)
    device = torch.device(name)
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= found.get(device.type, 0):
        have = ", ".join(f"{count} {kind}" for kind, count in found.items() if count)
        raise LoadError(f"device '{name}' does not exist on this machine (it has {have}); use 'auto' or 'cpu'")
    return device


def pick_dtype(precision: str, device: "torch.device") -> "torch.dtype | str":
    """The compute dtype. With `auto` it is "auto", the checkpoint's own dtype, on an accelerator; on a CPU it is
    bfloat16 if the processor computes that natively, else float32."""
    import torch

    if precision != "auto":
        return named_dtype(precision)
    if device.type != "cpu":
        return "auto"
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def named_dtype(precision: str) -> "torch.dtype":
    """The torch dtype of a YAML precision other than auto."""
    import torch

    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions that multiply bfloat16."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def device_name(device: "torch.device") -> str:
    """The device's full name, so that each device has only one: "cuda" is "cuda:0"."""
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type


def size_text(size: int) -> str:
    """A number of bytes as text, in powers of ten, as cards and disks are sold: 13.48 GB, 67.1 MB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{size} B"


def free_memory(device: "torch.device") -> int | None:
    """The free bytes of the device; None if the system does not report them. The CUDA context's own memory is not free."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory()) - int(torch.mps.current_allocated_memory())
    return main_memory()


def main_memory(root: Path = Path("/")) -> int | None:
    """The bytes of main memory that this process may still take; None if the system does not report them.

    A control group (a container) may limit them further than the machine does. Page cache counts as free, since the kernel
    gives it up when memory is needed. root: the folder that holds proc and sys.
    """
    available = _meminfo(root)
    if available is None:
        return None
    return max(0, min([available, *_left_in_groups(root)]))


def _meminfo(root: Path) -> int | None:
    """MemAvailable on Linux. Elsewhere all physical memory, which is the only number available, or None."""
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _left_in_groups(root: Path) -> Iterator[int]:
    """The bytes left in each of this process's memory control groups and in their parents (versions 1 and 2)."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # In a container this path may not exist: the container's own group is mounted at the top.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdigit() and used.isdigit() and int(most) < UNLIMITED:
                yield int(most) - int(used) + _statistic(_text(folder / "memory.stat"), cache)


def _statistic(text: str, name: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.split()[0] == name), 0)


def _text(path: Path) -> str:
    """The file's text; empty if there is no such file, since kernels differ in the files that they offer."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
