"""Writes the README.md of an exported folder: a model card that says what the folder was made from."""

from pathlib import Path

import yaml

from model_compose import __version__
from model_compose.export import Export
from model_compose.sources import HuggingfaceSource

EXACT = "exact: y = W x + Σ w·s·B(A x), the weighted sum"


def write_card(export: Export, folder: Path, *, rank: int | None = None) -> None:
    """Write folder/README.md, over a copy of the base's card. rank: of the exported adapter; None for a whole model."""
    header = {**_hub(export, rank), "model_compose": facts(export)}
    text = (
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n{_body(export, folder.name, rank)}"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _hub(export: Export, rank: int | None) -> dict[str, object]:
    """The keys of a model card that the Hub reads (hf.co/docs/hub/model-cards)."""
    source = export.options.model
    base = {"base_model": source.repository} if isinstance(source, HuggingfaceSource) else {}
    relation = {"base_model_relation": "merge" if rank is None else "adapter"} if base else {}
    library = "transformers" if rank is None else "peft"
    return {**base, **relation, "library_name": library, "pipeline_tag": "text-generation", "tags": ["lora"]}


def facts(export: Export) -> dict[str, object]:
    """What the export was made from. Exports of one format with equal facts have equal bytes."""
    return {
        "version": __version__,
        "identity": export.identity,
        "method": _method(export),
        "precision": export.order.precision,
        "base": {"source": export.base_name, "content": export.base.identity},
        "adapters": {
            name: {
                "weight": weight,
                "source": export.sources[name].name,
                "content": export.sources[name].identity,
                "sha256": export.adapters[name].digest,
            }
            for name, weight in export.blend.active.items()
        },
    }


def _method(export: Export) -> str:
    method = export.blend.method
    if method is None:
        return EXACT
    options = ", ".join(f"{name} {value}" for name, value in method.model_dump().items() if name != "method")
    return f"{method.method}, approximate ({options})"


def _body(export: Export, name: str, rank: int | None) -> str:
    blend = f"The blend `{export.blend.name}`" if export.blend.name else "A blend"
    rows = "".join(
        f"| {adapter} | {weight:g} | {export.sources[adapter].name} | `{export.adapters[adapter].digest[:16]}` |\n"
        for adapter, weight in export.blend.active.items()
    )
    what = (
        "a whole model with the adapters added to its weights" if rank is None else f"one LoRA adapter of rank {rank}"
    )
    return (
        f"# {name}\n\n"
        f"{blend} of LoRA adapters on {export.base_name}, as {what}. Written by "
        f"`model-compose export --format {export.order.format}` {__version__}.\n\n"
        f"| adapter | weight | source | sha256 |\n|---|---|---|---|\n{rows}\n"
        f"Method: {_method(export)}. Identity of the blend: `{export.identity}`.\n\n{_usage(rank)}"
    )


def _usage(rank: int | None) -> str:
    if rank is None:
        return "Load it like the base model. The licences of the base and of the adapters apply.\n"
    return (
        "Its scaling is 1 and every module has the same rank, so PEFT (`PeftModel.from_pretrained(base, folder)`), vLLM "
        f"(`--enable-lora --max-lora-rank N`, N at least {rank}) and SGLang load it as it is. The licences of the base and "
        "of the adapters apply.\n"
    )
