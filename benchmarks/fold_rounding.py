"""Claim: folding adapters into bfloat16 weights loses part of them to rounding; running them live does not.

    python -m benchmarks.fold_rounding

For each adapter of the quickstart at weight 1, over all its modules, this prints the RMS of (folded weight - weight -
delta) relative to the RMS of the delta, and the share of weight entries that the fold does not change.
"""

import torch

from benchmarks.blend_exactness import ADAPTERS, load_base
from model_compose.lora.adapter import read_adapter


@torch.no_grad()
def main() -> None:
    model, _ = load_base()
    for name in ("alpaca", "pirate"):
        lost, whole, unchanged, entries = 0.0, 0.0, 0, 0
        for path, factors in read_adapter(ADAPTERS / name, name).modules.items():
            weight = model.get_submodule(path).weight.bfloat16()
            delta = factors.scaling * (factors.b.float() @ factors.a.float())
            kept = (weight.float() + delta).bfloat16().float() - weight.float()
            lost += float((kept - delta).square().sum())
            whole += float(delta.square().sum())
            unchanged += int((kept == 0).sum())
            entries += kept.numel()
        print(
            f"{name:<8} rounding {(lost / whole) ** 0.5:.1%} of the delta, {unchanged / entries:.1%} of entries unchanged"
        )


if __name__ == "__main__":
    main()
