"""The figures of the benchmark page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from genrec.benchmarks.results import Case, Change
from genrec.pages.drawing import GRID, INK, MUTED, PAPER, SERIES, legend, new_figure, styled, to_svg

TITLES = {
    "relu_attention": "ReLU attention",
    "group_layer_norm": "Group layer norm",
    "moe": "Mixture of experts",
    "rq_nearest": "Nearest code",
    "training": "Training",
    "generation": "Generation",
    "tokenizer": "Tokenizer",
    "features": "Feature pipeline",
    "overhead": "Smallest calls",
}
BACKWARD = "with backward"
NOISE = 0.05  # ratios so near 1 are neither ahead nor behind


def title_of(op: str) -> str:
    return TITLES.get(op, op)


@styled
def ratios(cases: Sequence[Case], changes: Mapping[str, Change], what: str = "speed") -> str:
    """A bar for every case, from 1× on: how many times ours the strongest peer takes, of time or of memory. A ring is
    the baseline, a tick what was aimed at."""
    figure, (panel,) = new_figure(1, height=0.75 + 0.25 * len(cases), width=8.4)
    values = [case.ratio if what == "speed" else case.memory_ratio for case in cases]
    for place, (case, ratio) in enumerate(zip(cases, values, strict=True)):
        colour = SERIES[2] if BACKWARD in case.name else SERIES[0]
        colour = SERIES[1] if ratio < 1 - NOISE else colour if ratio > 1 + NOISE else MUTED
        panel.barh(place, ratio - 1, left=1, color=colour, height=0.62)
        panel.annotate(
            f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×", (max(ratio, 1), place), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=10, zorder=5,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        if what == "speed" and math.isfinite(case.ours.goal):
            panel.plot([case.ours.goal] * 2, [place - 0.36, place + 0.36], color=INK, linewidth=1.4)
        if what == "speed" and case.name in changes:
            panel.plot([changes[case.name].before], [place], "o", markerfacecolor=PAPER, color=MUTED, markersize=5)
    panel.set_yticks(range(len(cases)), [case.name for case in cases], fontsize=10)
    panel.set_ylim(len(cases) - 0.4, -0.6)
    _multiples(panel, [*values, *(case.ours.goal for case in cases)])
    return to_svg(figure, f"Ratios of {what} for {len(cases)} cases")


@styled
def overview(cases: Sequence[Case]) -> str:
    """A dot for every case, a row for every operator and pass."""
    rows: dict[str, list[float]] = {}
    order = list(TITLES)
    for case in sorted(cases, key=lambda case: order.index(case.ours.op) if case.ours.op in order else len(order)):
        way = f", {BACKWARD}" if BACKWARD in case.name else ""
        rows.setdefault(title_of(case.ours.op) + way, []).append(case.ratio)
    figure, (panel,) = new_figure(1, height=0.75 + 0.3 * len(rows), width=8.4)
    for place, (name, values) in enumerate(rows.items()):
        colour = SERIES[2] if BACKWARD in name else SERIES[0]
        panel.plot([min(values), max(values)], [place, place], color=GRID, linewidth=6, solid_capstyle="round")
        panel.plot(values, [place] * len(values), "o", color=colour, markersize=6, alpha=0.75, markeredgewidth=0)
        median = float(np.median(values))
        panel.plot([median] * 2, [place - 0.3, place + 0.3], color=INK, linewidth=2)
    panel.set_yticks(range(len(rows)), list(rows))
    panel.set_ylim(len(rows) - 0.4, -0.6)
    _multiples(panel, [value for values in rows.values() for value in values])
    panel.set_xlabel("times as fast as the strongest peer")
    return to_svg(figure, "How many times as fast as the strongest peer, by operator")


def _multiples(panel: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis of multiples, with a line at 1×."""
    finite = [value for value in values if math.isfinite(value) and value > 0]
    panel.set_xscale("log")
    panel.set_xlim(min([0.9, *finite]) / 1.08, max([1.2, *finite]) * 1.3)
    ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 300) if panel.get_xlim()[0] <= t]
    panel.set_xticks([t for t in ticks if t <= panel.get_xlim()[1]])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.axvline(1, color=MUTED, linewidth=1)
    panel.grid(axis="y", visible=False)
    panel.grid(axis="x", visible=True)
    panel.tick_params(axis="y", length=0)


@styled
def roofline(cases: Sequence[Case]) -> str:
    """FLOP/s over FLOPs per byte, ours and the strongest peer's, under what the device's own matmul and copy reach."""
    shown = [case for case in cases if case.ours.flops > 0 and case.ours.bytes > 0]
    if not shown:
        return ""
    first = shown[0].ours
    figure, (panel,) = new_figure(1, height=3.9)
    intensity = np.array([case.ours.flops / case.ours.bytes for case in shown])
    x = np.geomspace(intensity.min() / 2, intensity.max() * 2)
    panel.plot(x, np.minimum(first.matmul_rate, x * first.copy_rate), color=INK, linewidth=1.4)
    for rows, colour, label in (
        ([case.peer for case in shown], MUTED, "strongest peer"), ([case.ours for case in shown], SERIES[0], "genrec"),
    ):  # fmt: skip
        rates = [row.flops / row.seconds for row in rows]
        panel.plot(intensity, rates, "o", color=colour, markersize=4.5, alpha=0.75, markeredgewidth=0, label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e9:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_title("GFLOP/s")
    panel.set_xlabel("FLOPs per byte")
    legend(panel)
    return to_svg(figure, "Roofline")


@styled
def costs(name: str, cases: Sequence[Case]) -> str:
    """Time of every contender along the axis of a series."""
    contenders = list(dict.fromkeys(row.contender for case in cases for row in case.rows))
    figure, (panel,) = new_figure(1, height=3 + 0.12 * len(contenders))
    for number, contender in enumerate(contenders):
        points = sorted(
            (row.at, row.seconds * 1e3) for case in cases for row in case.rows if row.contender == contender
        )
        panel.plot(
            *zip(*points, strict=True), "o-", color=SERIES[number % len(SERIES)], label=contender, markersize=4,
            linewidth=2.6 if number == 0 else 1.4,
        )  # fmt: skip
    panel.set_xscale("log")
    panel.set_yscale("log")
    places = sorted({case.ours.at for case in cases})
    panel.set_xticks(places, [f"{place:g}" for place in places])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_title("milliseconds")
    panel.set_xlabel(cases[0].ours.axis)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5, handlelength=1.2)
    return to_svg(figure, f"Time along {cases[0].ours.axis}: {name}")
