"""Examines the adapters of a model for the command `adapters`: whether they fit the base, and how they compare.

Like `plan`, it reads only the base's config. It reads the adapters completely.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_compose.engines.on_disk import CONFIG_FILES
from model_compose.engines.options import ModelOptions
from model_compose.errors import AdapterError, LoadError, SourceError
from model_compose.lora.adapter import LoraAdapter, check, read_adapter
from model_compose.lora.blend import Blend, Blends
from model_compose.lora.peft_config import read_config
from model_compose.progress import Progress, Report
from model_compose.sources import LocalSource, ModelSource, describe

if TYPE_CHECKING:
    from model_compose.lora.adapter import ModuleShape
    from model_compose.lora.geometry import Geometry, Pair
    from model_compose.sources import Fetched


@dataclass(frozen=True)
class Inspected:
    """One adapter. ranks, alphas, scalings: all values that occur in its modules, ascending. size: the bytes of the file
    with its weights."""

    name: str
    source: str
    adapter: LoraAdapter
    alphas: tuple[float, ...]
    size: int
    warnings: tuple[str, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({factors.rank for factors in self.adapter.modules.values()}))

    @property
    def scalings(self) -> tuple[float, ...]:
        return tuple(sorted({factors.scaling for factors in self.adapter.modules.values()}))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of its factors in the file."""
        tensors = [tensor for factors in self.adapter.modules.values() for tensor in (factors.a, factors.b)]
        return tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))

    @property
    def parameters(self) -> int:
        return sum(factors.a.numel() + factors.b.numel() for factors in self.adapter.modules.values())


@dataclass(frozen=True)
class Inspection:
    """The adapters of one model, or of folders that belong to no model (`component` and `base` are then None).

    adapters: all that can be used. shown: the names that the user asked for; the geometry covers all adapters. problems:
    one sentence for each adapter that cannot be used. unchecked: why the adapters could not be checked against the base.
    """

    component: str | None
    base: str | None
    blend: Blend
    adapters: tuple[Inspected, ...]
    shown: tuple[str, ...]
    geometry: "Geometry"
    problems: tuple[str, ...] = ()
    unchecked: str | None = None

    @property
    def listed(self) -> tuple[Inspected, ...]:
        """The adapters that the user asked for."""
        return tuple(each for each in self.adapters if each.name in self.shown)

    @property
    def pairs(self) -> "tuple[Pair, ...]":
        """The pairs with at least one adapter that the user asked for, those with the largest overlap first."""
        found = [pair for pair in self.geometry.pairs if {pair.one, pair.other} & set(self.shown)]
        return tuple(sorted(found, key=_overlap, reverse=True))


@dataclass(frozen=True)
class Base:
    """A base known by its config only. fetched: where the config is. shapes: the modules' shapes, by path."""

    options: ModelOptions
    fetched: "Fetched"
    shapes: "Mapping[str, ModuleShape]"


def inspect(
    options: ModelOptions | None, folders: Mapping[str, str], base_dir: Path, *, component: str | None, blend: Any,
    names: Collection[str] = (), report: Report,
) -> Inspection:  # fmt: skip
    """Read and compare the adapters of a model (`options`, or None if there is no model) and of `folders`, {name: path}.

    blend: a name, {adapter: weight}, or None for the default (without a model: every adapter with weight 1). names: the
    adapters to show; all if empty. Raises InputError for an unknown blend, AdapterError for adapters of different bases.
    """
    sources: dict[str, ModelSource] = {}
    blends = Blends((), {}, Blend(dict.fromkeys(folders, 1.0)))
    base, unchecked = None, None
    if options is not None:
        pairs = zip(options.adapter_names, options.peft_adapters, strict=True)
        sources = {name: adapter.model for name, adapter in pairs}
        blends = options.to_blends()
        base, unchecked = _read_base(options, base_dir, report)
    sources |= {name: LocalSource(path=path) for name, path in folders.items()}
    chosen = Blends((*blends.adapters, *folders), blends.named, blends.default).resolve(blend)
    found, problems = [], []
    for name, source in sources.items():
        try:
            found.append(_read(name, source, base_dir, base, report))
        except (AdapterError, SourceError) as error:
            problems.append(str(error))
    return Inspection(
        component, describe(options.model) if options else None, chosen, tuple(found),
        tuple(names) or tuple(sources), _measure(found, report), tuple(problems), unchecked,
    )  # fmt: skip


def _measure(found: Collection[Inspected], report: Report) -> "Geometry":
    from model_compose.lora.geometry import measure

    return measure(
        [each.adapter for each in found],
        lambda done, total: report(Progress("comparing adapters", done, total, "modules")),
    )


def _read_base(options: ModelOptions, base_dir: Path, report: Report) -> tuple[Base | None, str | None]:
    """The base, or the reason why its shapes are unknown."""
    from model_compose.engines.blueprint import read_blueprint
    from model_compose.sources.survey import survey

    try:
        found = survey(options.model, base_dir=base_dir, only=CONFIG_FILES, report=report).fetched
        if found is None:
            return None, "the base's config comes with its weights, which have not been downloaded yet"
        shapes = read_blueprint(options, found).shapes
    except (SourceError, LoadError) as error:
        return None, str(error)
    return Base(options, found, shapes), None


def _read(name: str, source: ModelSource, base_dir: Path, base: Base | None, report: Report) -> Inspected:
    """Read one adapter and, if the base is known, check that it fits. Raises SourceError or AdapterError."""
    from model_compose.engines.adapters import fetch_adapter_folder
    from model_compose.lora.adapter import WEIGHT_FILES

    folder = fetch_adapter_folder(name, source, base_dir, report)
    adapter, config = read_adapter(folder, name), read_config(folder, name)
    if base is not None:
        adapter = check(adapter, base.shapes)
    modules = adapter.modules.values()
    power = 0.5 if config.get("use_rslora") else 1.0
    # The scaling is alpha / r, or alpha / √r for rsLoRA. Rounding removes the division's error, as alphas are mostly whole.
    alphas = sorted({round(factors.scaling * factors.rank**power, 9) for factors in modules})
    size = next((folder / file).stat().st_size for file in WEIGHT_FILES if (folder / file).is_file())
    return Inspected(name, describe(source), adapter, tuple(alphas), size, tuple(_warnings(adapter, config, base)))


def _warnings(adapter: LoraAdapter, config: Mapping[str, Any], base: Base | None) -> list[str]:
    """Things that are not errors but may be mistakes, each a sentence without its subject (the adapter)."""
    from model_compose.engines.blueprint import other_base

    found = []
    if base is not None and (warning := other_base(adapter, base.options, base.fetched)):
        found.append(warning)
    zeros = [path for path, factors in adapter.modules.items() if not (factors.a.any() and factors.b.any())]
    if len(zeros) == len(adapter.modules):
        found.append("is zero in every module, so it changes nothing; was it trained?")
    elif zeros:
        found.append(f"is zero in {len(zeros)} of its {len(adapter.modules)} modules, such as {zeros[0]}")
    listed = config.get("target_modules")
    named = listed if isinstance(listed, list) else []
    if missing := [name for name in named if not any(f".{path}".endswith(f".{name}") for path in adapter.modules)]:
        found.append(f"lists the target {', '.join(map(str, missing))}, but has no weights for it")
    if adapter.copies:
        found.append(
            f"brings a copy of the base's {', '.join(adapter.copies)}; loading the model will check that it is equal"
        )
    return found


def _overlap(pair: "Pair") -> float:
    return sum(side.value for side in (pair.inputs, pair.outputs) if side is not None)


def as_json(inspection: Inspection) -> dict[str, Any]:
    """All results, also by layer. Sizes are in bytes. Norms are Frobenius norms of s B A, without the blend's weights."""
    geometry, weights = inspection.geometry, inspection.blend.weights
    norms, shares = geometry.norms(), geometry.shares(weights)
    layers = {layer: (geometry.norms(layer=layer), geometry.shares(weights, layer=layer)) for layer in geometry.layers}
    by_target = {target: geometry.norms(target=target) for target in geometry.targets}
    return {
        "component": inspection.component,
        "base": inspection.base,
        "unchecked": inspection.unchecked,
        "blend": {
            "name": inspection.blend.name, "weights": dict(weights),
            "method": inspection.blend.method.model_dump() if inspection.blend.method else None,  # norms ignore it
            "norm": geometry.blend_norm(weights),
            "layers": {layer: geometry.blend_norm(weights, layer=layer) for layer in layers},
        },
        "adapters": [
            {
                "name": each.name, "source": each.source, "trained_on": each.adapter.base,
                "ranks": each.ranks, "alphas": each.alphas, "scalings": each.scalings, "dtypes": each.dtypes,
                "targets": targets_of(each), "modules": len(each.adapter.modules), "parameters": each.parameters,
                "bytes": each.size, "norm": norms[each.name],
                "weight": weights.get(each.name, 0.0), "share": shares[each.name],
                "layers": {
                    layer: {"norm": norm[each.name], "share": share[each.name]}
                    for layer, (norm, share) in layers.items()
                },
                "norms_by_target": {target: norm[each.name] for target, norm in by_target.items()},
                "warnings": each.warnings,
            }
            for each in inspection.listed
        ],
        "pairs": [
            {
                "adapters": [pair.one, pair.other], "modules": pair.modules, "cosine": pair.cosine,
                "inputs": pair.inputs and vars(pair.inputs), "outputs": pair.outputs and vars(pair.outputs),
            }
            for pair in inspection.pairs
        ],
        "problems": inspection.problems,
    }  # fmt: skip


def targets_of(inspected: Inspected) -> list[str]:
    """The adapter's target modules (q_proj, …), in the order of the model."""
    from model_compose.lora.geometry import place

    places = sorted(place(path) for path in inspected.adapter.modules)
    return list(dict.fromkeys(each.target for each in places))
