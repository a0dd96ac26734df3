"""What folding does to one weight: it is separated from modules that share it, replaced by a new one, and paged out."""

import ctypes
import mmap
import sys

import torch
from torch import Tensor, nn

MADV_PAGEOUT = 21
"""From <asm-generic/mman-common.h>; Linux 5.4 and newer."""

FOLD_ROWS_BYTES = 64 << 20
"""A fold takes as many rows at a time as have a float32 sum of at most this size, so that it needs little memory."""


def swap(module: nn.Module, new: Tensor) -> Tensor:
    """Gives the module another weight and returns the one that it had."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    old, weight.data = weight.data, new
    return old


def add_in_blocks(weight: Tensor, left: Tensor, right: Tensor, result: Tensor) -> None:
    """result = weight + left · right. The sum is formed in float32, for some rows at a time."""
    step = max(1, FOLD_ROWS_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        result[rows] = torch.addmm(weight[rows].float(), left[rows], right)


def untie(model: nn.Module, module: nn.Module) -> None:
    """Gives the module a parameter of its own if another module shares it: folding one must not change the other."""
    shared = [
        other for other in model.modules() if other is not module and other._parameters.get("weight") is module.weight
    ]
    if shared:
        assert isinstance(module.weight, Tensor)
        module.weight = nn.Parameter(module.weight.data, requires_grad=False)


def page_out(tensor: Tensor) -> None:
    """Tells the kernel that this tensor will not be read for a long time.

    Pages that are mapped from a checkpoint then leave memory; the kernel reads them from the file again when they are
    needed. This is only advice: it changes no value, and a kernel that does not know it ignores it.
    """
    if tensor.device.type != "cpu" or sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes - start) // page * page
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_PAGEOUT)
