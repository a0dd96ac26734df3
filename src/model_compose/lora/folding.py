"""What a fold does to one weight: a new one in its place, the old one kept, untied from others and paged out."""

import ctypes
import mmap
import sys

import torch
from torch import Tensor, nn

MADV_PAGEOUT = 21
"""<asm-generic/mman-common.h>; Linux 5.4 and newer."""

FOLD_ROWS_BYTES = 64 << 20
"""A fold works on row blocks whose float32 sum is at most this large, so that memory stays flat."""


def swap(module: nn.Module, new: Tensor) -> Tensor:
    """Gives the module another weight; returns the one it had."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    old, weight.data = weight.data, new
    return old


def add_in_blocks(weight: Tensor, left: Tensor, right: Tensor, result: Tensor) -> None:
    """result = weight + left right, summed in float32, some rows at a time."""
    step = max(1, FOLD_ROWS_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        result[rows] = torch.addmm(weight[rows].float(), left[rows], right)


def untie(model: nn.Module, module: nn.Module) -> None:
    """Gives the module a parameter of its own where another module shares it: a fold of one must not touch the other."""
    shared = [
        other for other in model.modules() if other is not module and other._parameters.get("weight") is module.weight
    ]
    if shared:
        assert isinstance(module.weight, Tensor)
        module.weight = nn.Parameter(module.weight.data, requires_grad=False)


def page_out(tensor: Tensor) -> None:
    """Tells the kernel that a tensor will not be read for long: pages that are mapped from a checkpoint leave memory and
    come back from the file when read. Advice only; harmless for any other memory, and where the kernel has none."""
    if tensor.device.type != "cpu" or sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes - start) // page * page
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_PAGEOUT)
