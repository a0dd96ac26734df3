"""How many bytes a device has free at this moment. Knows nothing of models."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

UNLIMITED = 1 << 60
"""Control groups of version 1 say "no limit" by a number about as large as addresses go."""


def free_memory(device: "torch.device") -> int | None:
    """Bytes free on the device; None where this system does not say. What the CUDA context itself takes is gone already."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory()) - int(torch.mps.current_allocated_memory())
    return main_memory()


def main_memory(root: Path = Path("/")) -> int | None:
    """Main memory that this process may still take: the machine's, or less where a control group (a container) limits it.

    Page cache counts as free, as it gives way. root: where /proc and /sys are.
    """
    available = _meminfo(root)
    if available is None:
        return None
    return max(0, min([available, *_left_in_groups(root)]))


def _meminfo(root: Path) -> int | None:
    """MemAvailable on Linux; elsewhere all memory there is, which is the only number at hand, else None."""
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _left_in_groups(root: Path) -> Iterator[int]:
    """limit - usage of this process's memory groups and of all above them, for version 2 and for version 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # In a container this path may not be there: what is mounted at the top is the container's own group.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdigit() and used.isdigit() and int(most) < UNLIMITED:
                yield int(most) - int(used) + _statistic(_text(folder / "memory.stat"), cache)


def _statistic(text: str, name: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.split()[0] == name), 0)


def _text(path: Path) -> str:
    """The file's text, empty where there is none: what a kernel offers differs."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
