"""`model-compose adapters list` and `inspect`: what the adapters are, and how they compare with each other."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model_compose.commands import completion
from model_compose.commands.options import (
    EnvFiles,
    EnvPairs,
    Files,
    Group,
    Verbose,
    all_files,
    blend_option,
    check_new_file,
    component_option,
    load_files,
    log_to_stderr,
    parse_blend,
)
from model_compose.errors import AdapterError, InputError, NotFound

if TYPE_CHECKING:
    from rich.console import Console

    from model_compose.engines.options import ModelOptions
    from model_compose.inspection import Inspected, Inspection
    from model_compose.loading import ComposeFile
    from model_compose.lora.geometry import Overlap

MOST_PAIRS = 20
GAP = 2
NOTES = {
    "norm": "the Frobenius norm of s B A over all modules",
    "share": "norm times weight, as a share of that sum over the blend's adapters",
    "cosine": "between the two whole updates: -1 means they cancel, 1 that they add up",
    "inputs, outputs": "how far the subspaces that A reads and B writes overlap, 0 to 1; chance: of random adapters",
}

app = typer.Typer(
    cls=Group, no_args_is_help=True, rich_markup_mode=None, help="Inspect adapters without loading a model."
)

Component = Annotated[str | None, component_option("The model. Default: all models")]
BlendOption = Annotated[
    str | None, blend_option("The blend whose shares are shown: its name, or weights. Default: the file's own weights")
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Save a plot as .png, .svg or .pdf (needs matplotlib)"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text, with all layers and sizes in bytes")]


@app.command("list", epilog="Example: model-compose adapters list --blend alpaca=0.5,pirate=1")
def list_adapters(
    files: Files = None,
    component: Component = None,
    blend: BlendOption = None,
    plot: PlotOption = None,
    as_json: AsJson = False,
    env_files: EnvFiles = None,
    env: EnvPairs = None,
    verbose: Verbose = False,
) -> None:
    """List the file's adapters and their shares of a blend.

    This also checks that they fit the model. Exit code 1: one does not.
    """
    log_to_stderr(verbose, level=logging.WARNING)
    loaded = load_files(files, env_files, env)
    _tell(loaded, (), component, blend, plot, as_json=as_json, deep=False)


@app.command("inspect", epilog="Example: model-compose adapters inspect ./adapters/mine --plot mine.png")
def inspect_adapters(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME|FOLDER", help="Names in the file, or PEFT folders. Default: all of the file",
            autocompletion=completion.adapters,
        ),
    ] = None,
    files: Files = None,
    component: Component = None,
    blend: BlendOption = None,
    plot: PlotOption = None,
    as_json: AsJson = False,
    env_files: EnvFiles = None,
    env: EnvPairs = None,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Show adapters layer by layer.

    Folders alone need no YAML file. With -f they are checked against the file's model.
    """
    log_to_stderr(verbose, level=logging.WARNING)
    given = adapters or ()
    alone = bool(given) and all(map(_is_folder, given)) and not (all_files(files) or component)
    loaded = None if alone else load_files(files, env_files, env)
    _tell(loaded, given, component, blend, plot, as_json=as_json, deep=True)


def _tell(
    loaded: "ComposeFile | None", given: Collection[str], component: str | None, blend: str | None, plot: Path | None, *,
    as_json: bool, deep: bool,
) -> None:  # fmt: skip
    from model_compose.terminal import bars, render

    draw = _drawing(plot)
    inspections = _inspect(loaded, given, component, blend, bars)
    if plot is not None:  # before the text, whose reader may leave early (| head)
        draw(inspections, plot)
    if as_json:
        from model_compose.inspection import as_json as documents

        print(render([documents(each) for each in inspections]))
    else:
        _show(inspections, deep=deep)
    if problems := [problem for each in inspections for problem in each.problems]:
        raise AdapterError("\n".join(problems))


def _drawing(plot: Path | None) -> Any:
    """The function that draws the plot. Raises InputError, before any work is done, if it could not be written."""
    if plot is None:
        return None
    from model_compose.commands.adapters_plot import KINDS, draw

    if plot.suffix.lower() not in KINDS:
        raise InputError(f"--plot: {plot.name} must end in {', '.join(KINDS)}")
    check_new_file(plot, "--plot")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    return draw


def _inspect(
    loaded: "ComposeFile | None", given: Collection[str], component: str | None, blend: str | None, bars: Any
) -> "list[Inspection]":
    """One inspection for each model that the command names. Raises NotFound, InputError, AdapterError."""
    from model_compose.inspection import inspect

    mix = parse_blend(blend)
    models = _models(loaded, component)
    known = {name for options in models.values() for name in options.adapter_names}
    named = [each for each in given if each in known]
    folders = _folders([each for each in given if each not in known], known)
    with bars() as report:
        if loaded is None:
            return [inspect(None, folders, Path.cwd(), component=None, blend=mix, report=report)]
        meant = {id: options for id, options in models.items() if not named or set(named) & set(options.adapter_names)}
        return [
            inspect(
                options, folders, loaded.base_dir, component=id, blend=mix, report=report,
                names=[*(name for name in named if name in options.adapter_names), *folders],
            )
            for id, options in meant.items()
        ]  # fmt: skip


def _models(loaded: "ComposeFile | None", component: str | None) -> "Mapping[str, ModelOptions]":
    """The model components by their public names, or only `component`. Raises NotFound."""
    from model_compose.schema import public_name

    found = dict(loaded.config.models) if loaded else {}
    if component is None:
        return found
    id = public_name(component)
    if id not in found:
        raise NotFound(f"--component: there is no model component '{component}'; known: {', '.join(found) or 'none'}")
    return {id: found[id]}


def _is_folder(text: str) -> bool:
    """Whether this means a folder. A bare word means an adapter's name if this folder has a YAML file."""
    from model_compose.nodes import FILE_NAMES

    is_name = "/" not in text and any(Path(name).is_file() for name in FILE_NAMES)
    return not is_name and Path(text).expanduser().is_dir()


def _folders(given: Collection[str], known: "set[str]") -> dict[str, str]:
    """Folders by the names that the output gives them. Raises NotFound for what is neither a name nor a folder."""
    folders: dict[str, str] = {}
    for text in given:
        path = Path(text).expanduser().resolve()
        if not path.is_dir():
            raise NotFound(
                f"there is no adapter and no folder '{text}'; adapters: {', '.join(sorted(known)) or 'none'}"
            )
        name = path.name
        while name in known or name in folders:
            name = f"{path.parent.name}/{name}" if "/" not in name else f"{name}'"
        folders[name] = str(path)
    return folders


# Tables are as wide as the terminal, and 80 columns wide when piped.


@dataclass(frozen=True)
class Column:
    """A column of a table. cells: one for each row."""

    header: str
    cells: Collection[str]
    left: bool = False

    @property
    def width(self) -> int:
        from rich.cells import cell_len

        return max(map(cell_len, (self.header, *self.cells)), default=0)


def _show(inspections: "Collection[Inspection]", *, deep: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    with console.capture() as captured:
        for number, inspection in enumerate(inspections):
            if number:
                console.print()
            _print(inspection, console, deep=deep)
        if not inspections:
            console.print("no model components, so no adapters")
        elif any(inspection.listed for inspection in inspections):
            _print_notes(console, with_pairs=any(inspection.pairs for inspection in inspections))
    for line in captured.get().splitlines():
        print(line.rstrip())


def _print(inspection: "Inspection", console: "Console", *, deep: bool) -> None:
    from rich.markup import escape

    if inspection.component:
        console.print(f"[bold]{escape(f'{inspection.component}: {inspection.base}')}[/]")
    if inspection.listed:
        _print_adapters(inspection, console)
        if inspection.pairs:
            _print_pairs(inspection, console)
        if deep:
            _print_layers(inspection, console)
    elif not inspection.problems:
        console.print("no adapters")
    for adapter in inspection.listed:
        for warning in adapter.warnings:
            console.print(f"[yellow]⚠[/] {escape(f'{adapter.name} {warning}')}")
    if inspection.unchecked:
        console.print(f"[yellow]⚠[/] {escape(f'not checked against the base: {inspection.unchecked}')}")
    for problem in inspection.problems:
        console.print(f"[red]✗[/] {escape(problem)}")


def _print_adapters(inspection: "Inspection", console: "Console") -> None:
    geometry, blend, listed = inspection.geometry, inspection.blend, inspection.listed
    norms, shares = geometry.norms(), geometry.shares(blend.weights)
    from model_compose.engines.devices import size_text

    _print_table(
        console,
        Column("adapter", [each.name for each in listed], left=True),
        [
            [column]
            for column in (
                Column("rank", [_range(each.ranks) for each in listed]),
                Column("alpha", [_range(each.alphas) for each in listed]),
                Column("scaling", [_range(each.scalings) for each in listed]),
                Column("dtype", [", ".join(each.dtypes) for each in listed]),
                Column("size", [size_text(each.size) for each in listed]),
                Column("norm", [_number(norms[each.name]) for each in listed]),
                Column("weight", [f"{blend.weights.get(each.name, 0):g}" for each in listed]),
                Column("share", [f"{shares[each.name]:.0%}" for each in listed]),
            )
        ],
    )
    console.print()
    _print_table(
        console,
        Column("adapter", [each.name for each in listed], left=True),
        [[Column("acts on", [_reach(each) for each in listed], left=True)]],
    )
    if len(blend.active) > 1:
        norm = geometry.blend_norm(blend.weights)
        parts = sum(abs(weight) * norms.get(name, 0.0) for name, weight in blend.active.items())
        console.print()
        name = f"the blend {blend.name}" if blend.name else "this blend"
        if blend.method is not None:  # the method's own result could only be known from dense updates
            name = f"the sum that {name} ({blend.method.method}) approximates"
        console.print(f"{name} has the norm {_number(norm)}; its parts add up to {_number(parts)}", markup=False)


def _reach(inspected: "Inspected") -> str:
    """q_proj, v_proj in 30 layers (60 modules, 460,800 parameters)"""
    from model_compose.inspection import targets_of
    from model_compose.lora.geometry import place

    layers = {found.layer for path in inspected.adapter.modules if (found := place(path)).order[0] == 1}
    where = f" in {len(layers)} layer{'s' if len(layers) > 1 else ''}" if layers else ""
    counts = f"{len(inspected.adapter.modules)} modules, {inspected.parameters:,} parameters"
    return f"{', '.join(targets_of(inspected))}{where} ({counts})"


def _print_pairs(inspection: "Inspection", console: "Console") -> None:
    pairs = inspection.pairs[:MOST_PAIRS]

    def side(overlaps: "Collection[Overlap | None]", header: str) -> list[Column]:
        values = ["–" if each is None else f"{each.value:.3f}" for each in overlaps]
        chances = ["–" if each is None else f"{each.by_chance:.3f}" for each in overlaps]
        return [Column(header, values), Column("chance", chances)]

    console.print()
    _print_table(
        console,
        Column("pair", [f"{pair.one} × {pair.other}" for pair in pairs], left=True),
        [
            [Column("cosine", ["–" if pair.cosine is None else f"{pair.cosine:z.3f}" for pair in pairs])],
            side([pair.inputs for pair in pairs], "inputs"),
            side([pair.outputs for pair in pairs], "outputs"),
            [Column("modules", [str(pair.modules) for pair in pairs])],
        ],
    )
    if more := len(inspection.pairs) - len(pairs):
        console.print(f"and {more} pairs that overlap less; --json has them all")


def _print_layers(inspection: "Inspection", console: "Console") -> None:
    geometry, weights = inspection.geometry, inspection.blend.weights
    for header, rows, of in (("layer", geometry.layers, "layer"), ("target", geometry.targets, "target")):
        norms = [geometry.norms(**{of: row}) for row in rows]
        groups = [
            [Column(f"{each.name} norm", [_number(norm[each.name]) for norm in norms])] for each in inspection.listed
        ]
        if of == "layer" and len(inspection.blend.active) > 1:
            shares = [geometry.shares(weights, layer=row) for row in rows]
            for group, each in zip(groups, inspection.listed, strict=True):
                group.append(Column("share", [f"{share[each.name]:.0%}" for share in shares]))
        console.print()
        _print_table(console, Column(header, rows, left=True), groups)


def _print_notes(console: "Console", *, with_pairs: bool) -> None:
    from rich.table import Table

    console.print()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, GAP, 0, 0))
    table.add_column(style="dim", max_width=10)
    table.add_column(style="dim", overflow="fold")
    for word, meaning in list(NOTES.items())[: None if with_pairs else 2]:
        table.add_row(word, meaning)
    console.print(table)


def _print_table(console: "Console", first: Column, groups: Collection[Collection[Column]]) -> None:
    """Prints the columns side by side. Groups of columns that do not fit follow below, after the first column again."""
    from rich.markup import escape
    from rich.table import Table

    width = min(first.width, max(8, console.width // 3))
    rest = list(groups)
    while rest:
        used, shown = width, list[Column]()
        while rest and (not shown or used + _width(rest[0]) <= console.width):
            used += _width(rest[0])
            shown += rest.pop(0)
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
        for column in (first, *shown):
            table.add_column(
                escape(column.header), justify="left" if column.left else "right", overflow="fold",
                no_wrap=column is not first and not column.left,
                width=width if column is first else None,
            )  # fmt: skip
        for cells in zip(first.cells, *(column.cells for column in shown), strict=True):
            table.add_row(*map(escape, cells))
        console.print(table)
        if rest:
            console.print()


def _width(group: Collection[Column]) -> int:
    return sum(GAP + column.width for column in group)


def _range(values: Collection[float]) -> str:
    """8, or 8–16."""
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}–{high}"


def _number(value: float) -> str:
    """Three significant digits, or a dash for 0."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}" if value else "–"
