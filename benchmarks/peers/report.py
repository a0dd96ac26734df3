"""Figures out of samples: medians with their ranges, pairwise ratios, a table, a plot."""

import importlib
import math
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.load import Answer

CONFIDENCE = 0.95
LEAST_FOR_INTERVAL = 6
"""Values that a distribution-free interval of this confidence needs."""


@dataclass(frozen=True)
class Series:
    """All that was measured of one system with one blend at one concurrency, in the order of the rounds.

    figures: one a round, compared pair by pair; tokens per second, or seconds to the first token.
    """

    system: str
    blend: str
    concurrency: int
    figures: Collection[float]
    answers: Collection[Collection[Answer]]

    @property
    def cell(self) -> str:
        return f"{self.system}:{self.blend}"


def median_interval(values: Collection[float]) -> tuple[float, float]:
    """Bounds of the median with at least 95 % confidence, whatever the distribution; the range of fewer than 6 values.

    Order statistics: P(median < k-th smallest) = P(Binomial(n, 1/2) < k).
    """
    ordered, n = sorted(values), len(values)
    tail, k = 0.0, 0
    while k < n // 2:
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 1 - CONFIDENCE:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def ratios(series: Series, baseline: Series) -> list[float]:
    return [ours / base for ours, base in zip(series.figures, baseline.figures, strict=True)]


def percentile(values: Iterable[float], share: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def rows(measured: Collection[Series], baseline: str) -> list[str]:
    """The table of one concurrency: throughput, ratio to the baseline's, latency."""
    base = next((series for series in measured if series.cell == baseline), None)
    enough = all(len(series.figures) >= LEAST_FOR_INTERVAL for series in measured)
    interval = "95 % of median" if enough else "low to high"
    made = [f"{'':24} {'tok/s':>7}  {interval:<17} {'x ' + baseline:<22} {'first token, ms':<17} ms per token"]
    for series in measured:
        low, high = median_interval(series.figures)
        answers = [answer for wave in series.answers for answer in wave]
        first = [1000 * answer.first for answer in answers]
        per_token = statistics.median(1000 * answer.per_token for answer in answers)
        latency = f"{statistics.median(first):.0f}, p95 {percentile(first, 0.95):.0f}"
        made.append(
            f"{series.cell:24} {statistics.median(series.figures):7.1f}  {f'{low:.1f} to {high:.1f}':<17} "
            f"{spread(series, base):<22} {latency:<17} {per_token:.1f}"
        )
    return made


def spread(series: Series, base: Series | None) -> str:
    """Median, lowest and highest of the ratios to the baseline of the same round."""
    if base is None:
        return "–"
    compared = ratios(series, base)
    return f"{statistics.median(compared):.2f} ({min(compared):.2f} to {max(compared):.2f})"


def milliseconds(series: Series) -> str:
    """Median and 95 % interval of figures in seconds."""
    low, high = median_interval(series.figures)
    return f"{1000 * statistics.median(series.figures):.0f} ({1000 * low:.0f} to {1000 * high:.0f})"


LINES = {"base": "-", "one": "--", "own": ":", "two": "-.", "all": (0, (1, 4))}


def plot(measured: Collection[Series], title: str, file: Path) -> None:
    """Throughput over concurrency: a colour a system, a line style a blend; the bars are the lowest and the highest."""
    # By name: matplotlib is in none of the package's extras, and mypy would miss it.
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    systems = list(dict.fromkeys(series.system for series in measured))
    for cell in dict.fromkeys(series.cell for series in measured):
        line = [series for series in measured if series.cell == cell]
        middle = [statistics.median(series.figures) for series in line]
        below = [m - min(series.figures) for m, series in zip(middle, line, strict=True)]
        above = [max(series.figures) - m for m, series in zip(middle, line, strict=True)]
        axes.errorbar(
            [series.concurrency for series in line], middle, yerr=[below, above], label=cell, capsize=3,
            color=f"C{systems.index(line[0].system)}", linestyle=LINES[line[0].blend], marker="o", markersize=4,
        )  # fmt: skip
    ticks = sorted({series.concurrency for series in measured})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="requests at once", ylabel="tokens per second in all", title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(file, dpi=150)
