"""The plot of `adapters list` and `inspect`: norms and shares by layer, and how far each pair of adapters overlaps."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from model_compose.errors import InputError
from model_compose.inspection import Inspection

KINDS = (".png", ".svg", ".pdf")
COLORS = ("#3b6fb6", "#e07b39", "#3a9d6e", "#b8527d", "#8a6fc2", "#8c8c3a", "#4aa3b5", "#a0522d")
LEGEND_CHARACTERS = 170
"""How many characters of a legend fit into one line below the plot."""
GREY = "#6b6b6b"
STYLE = {
    "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titlepad": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#b0b0b0", "axes.labelcolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "legend.frameon": False, "axes.grid.axis": "y", "grid.color": "#e6e6e6",
    "axes.axisbelow": True, "svg.fonttype": "none",
}  # fmt: skip


def draw(inspections: Collection[Inspection], path: Path) -> None:
    """Writes the plot, with a row for each model. Raises InputError if the file cannot be written."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [inspection for inspection in inspections if inspection.listed]
    with matplotlib.rc_context(STYLE):
        height = sum(6.2 if len(inspection.blend.active) > 1 else 4.0 for inspection in drawn) or 1.0
        figure: Any = Figure(figsize=(12, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        engine: Any = figure.get_layout_engine()
        engine.set(w_pad=0.1, h_pad=0.1)
        parts = np.atleast_1d(figure.subfigures(max(1, len(drawn)), 1))
        for part, inspection in zip(parts, drawn, strict=False):
            _draw_model(part, inspection)
        try:
            figure.savefig(path)
        except OSError as error:
            raise InputError(f"--plot: {path} cannot be written ({error.strerror})") from None


def _draw_model(part: Any, inspection: Inspection) -> None:
    from matplotlib.lines import Line2D

    with_pairs = len(inspection.adapters) > 1
    if inspection.component:
        part.suptitle(f"{inspection.component}: {inspection.base}", fontweight="bold", x=0.01, ha="left")
    with_shares = len(inspection.blend.active) > 1
    areas = part.subfigures(1, 2, width_ratios=(1.9, 1)) if with_pairs else [part]
    axes = areas[0].subplots(2 if with_shares else 1, 1, sharex=True, squeeze=False)[:, 0]
    _draw_norms(axes[0], inspection)
    if with_shares:
        _draw_shares(axes[1], inspection)
    _label_layers(axes[-1], inspection.geometry.layers)
    if with_pairs:
        handles = [
            Line2D([], [], color=color, linewidth=6, label=_label(inspection, name))
            for name, color in _colors(inspection).items()
        ]
        columns = max(1, LEGEND_CHARACTERS // (max(len(str(handle.get_label())) for handle in handles) + 6))
        part.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=9, handlelength=0.8)
        _draw_overlaps(areas[1], inspection)


def _label(inspection: Inspection, name: str) -> str:
    """pirate (weight 0.5, 21%)"""
    weight = inspection.blend.weights.get(name, 0)
    share = inspection.geometry.shares(inspection.blend.weights)[name]
    return f"{name} (weight {weight:g}, {share:.0%})"


def _draw_norms(axes: Any, inspection: Inspection) -> None:
    geometry = inspection.geometry
    norms = [geometry.norms(layer=layer) for layer in geometry.layers]
    for name, color in _colors(inspection).items():
        values = [norm[name] or np.nan for norm in norms]  # a layer without it is a gap, not a zero
        axes.plot(values, color=color, marker="o", markersize=3.5, linewidth=1.6)
    top = max((value for norm in norms for value in norm.values()), default=0.0)
    axes.set_ylim(0, 1.08 * top or 1)
    axes.grid(visible=True, axis="y")
    whose = "Norm of each adapter's" if len(inspection.adapters) > 1 else f"Norm of {inspection.adapters[0].name}'s"
    axes.set_title(f"{whose} update, ‖s B A‖, without its weight")


def _draw_shares(axes: Any, inspection: Inspection) -> None:
    geometry, weights = inspection.geometry, inspection.blend.weights
    shares = [geometry.shares(weights, layer=layer) for layer in geometry.layers]
    bottom = np.zeros(len(shares))
    colors = _colors(inspection)
    for name in (name for name in geometry.names if weights.get(name)):
        values = np.array([share[name] for share in shares])
        axes.bar(range(len(values)), values, bottom=bottom, color=colors[name], width=0.82)
        bottom += values
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    name = f" '{inspection.blend.name}'" if inspection.blend.name else ""
    axes.set_title(f"Share of each adapter in the blend{name}")


def _draw_overlaps(area: Any, inspection: Inspection) -> None:
    names = inspection.geometry.names
    for axes, side, title in zip(
        area.subplots(2, 1), ("inputs", "outputs"),
        ("Overlap of what they read (A)", "Overlap of what they write (B)"), strict=True,
    ):  # fmt: skip
        values, chances = np.full((len(names), len(names)), np.nan), []
        for pair in inspection.geometry.pairs:
            found = getattr(pair, side)
            i, j = names.index(pair.one), names.index(pair.other)
            if found is not None:
                values[i, j] = values[j, i] = found.value
                chances.append(found.by_chance)
        axes.set_facecolor("#f2f2f2")
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="equal")
        axes.set_xticks(range(len(names)), names, rotation=0 if sum(map(len, names)) < 30 else 90)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title)
        if chances:
            axes.set_xlabel(f"0 to 1; random adapters: {np.mean(chances):.3f}", fontsize=9)
        if len(names) <= 8:
            for (i, j), value in np.ndenumerate(values):
                if i != j:
                    text = "–" if np.isnan(value) else f"{value:.2f}"
                    axes.text(
                        j,
                        i,
                        text,
                        ha="center",
                        va="center",
                        color="white" if value > 0.55 else "#303030",
                        fontsize=min(9, 52 / len(names)),
                    )


def _label_layers(axes: Any, layers: tuple[str, ...]) -> None:
    """Labels every layer, or every n-th if there are many. Modules outside of the layers get their names."""
    step = -(-len(layers) // 20)
    shown = [i for i, layer in enumerate(layers) if not layer.isdecimal() or int(layer) % step == 0]
    axes.set_xticks(shown, [layers[i] for i in shown])
    for label in axes.get_xticklabels():
        if not label.get_text().isdecimal():
            label.set(rotation=90)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_xlabel("layer")


def _colors(inspection: Inspection) -> dict[str, str]:
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(inspection.geometry.names)}
