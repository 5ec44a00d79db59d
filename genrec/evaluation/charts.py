"""The figures of the report of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from genrec.evaluation.metrics import Interval
from genrec.pages.drawing import GRID, MUTED, PAPER, SERIES, legend, new_figure, styled, to_svg

Row = Mapping[str, object]  # one line of metrics.jsonl

MAX_POINTS = 240  # more than the pixels of a chart; longer curves are averaged in equal bins


@styled
def bars(metrics: Mapping[str, Mapping[str, float]], names: Mapping[str, str], keys: Sequence[str]) -> str:
    """Horizontal bars, one panel a metric, one bar a ranker; the first ranker is the one the page is about."""
    figure, axes = new_figure(len(keys), height=0.62 + 0.34 * len(metrics) * len(keys))
    for panel, key in zip(axes, keys, strict=True):
        values = [metrics[name].get(key, math.nan) for name in metrics]
        colours = [SERIES[0] if place == 0 else GRID for place in range(len(values))]
        drawn = panel.barh(range(len(values)), np.nan_to_num(values), color=colours, height=0.66)
        panel.bar_label(drawn, [f"{value:.4f}" if math.isfinite(value) else "–" for value in values], padding=4)
        panel.set_yticks(range(len(values)), [names[name] for name in metrics])
        panel.invert_yaxis()
        panel.set_title(metric_name(key))
        panel.set_xlim(0, 1.2 * max([*np.nan_to_num(values), 1e-6]))
        panel.xaxis.set_visible(False)
        panel.grid(False)
        panel.spines["bottom"].set_visible(False)
        panel.tick_params(axis="y", length=0)
    return to_svg(figure, f"Bars of {' and '.join(keys)} for every ranker")


@styled
def differences(intervals: Mapping[str, Interval], names: Mapping[str, str], metric: str) -> str:
    """A point and its interval for every comparison, beside the line of no difference."""
    figure, (panel,) = new_figure(1, height=0.75 + 0.45 * len(intervals))
    for place, interval in enumerate(intervals.values()):
        colour = MUTED if interval.verdict == "within noise" else SERIES[0 if interval.low > 0 else 1]
        panel.plot([interval.low, interval.high], [place, place], color=colour, linewidth=4, solid_capstyle="round")
        panel.plot([interval.difference], [place], "o", color=colour, markersize=9)
        panel.annotate(
            signed(interval.difference), (interval.high, place), xytext=(7, 0), textcoords="offset points", va="center"
        )
    bounds = [0.0, *(bound for interval in intervals.values() for bound in (interval.low, interval.high))]
    width = max(max(bounds) - min(bounds), 1e-6)
    panel.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    panel.set_xlim(min(bounds) - 0.08 * width, max(bounds) + 0.3 * width)  # room for the numbers
    panel.set_ylim(len(intervals) - 0.4, -0.6)
    panel.set_yticks(range(len(intervals)), [f"vs {names[name]}" for name in intervals])
    panel.grid(False)
    panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.set_xlabel(f"difference in {metric_name(metric)}")
    return to_svg(figure, f"Differences in {metric} with their intervals")


@styled
def curves(rows: Sequence[Row], panels: Mapping[str, Mapping[str, str]], x_label: str = "step") -> str:
    """Curves over steps: `panels` maps a title to {key of the rows: label}. Panels without points are left out; empty
    where none has any."""
    drawn = {
        title: [(label, *points) for key, label in keys.items() if (points := _points(rows, key))]
        for title, keys in panels.items()
    }
    return _stacked({title: lines for title, lines in drawn.items() if lines}, x_label)


@styled
def levels(rows: Sequence[Row], panels: Mapping[str, str]) -> str:
    """Curves over epochs, one a codebook level: `panels` maps a title to the key of lists, one number per level."""
    drawn = {
        title: [(f"level {level + 1}", points[0], column) for level, column in enumerate(points[1].T)]
        for title, key in panels.items()
        if (points := _lists(rows, key))
    }
    return _stacked(drawn, "epoch")


@styled
def router_load(stages: Mapping[str, Sequence[Row]]) -> str:
    """Share of the tokens that each expert gets, as a multiple of an equal share; every stage has the same width."""
    loads = [_thin(*points)[1] for rows in stages.values() if (points := _lists(rows, "expert_load"))]
    names = [stage for stage, rows in stages.items() if _lists(rows, "expert_load")]
    if not loads:
        return ""
    loads = [load * load.shape[1] for load in loads]
    experts = max(load.shape[1] for load in loads)
    high = max(1.5, *(float(np.quantile(load, 0.995)) for load in loads))

    figure, (heat, extremes) = new_figure(2, height=3.7, sharex=True, height_ratios=[1.6, 1])
    for place, load in enumerate(loads):
        extent = (place, place + 1, load.shape[1], 0)
        image = heat.imshow(load.T, "cividis", aspect="auto", vmin=0, vmax=high, extent=extent, interpolation="nearest")
        x = place + (np.arange(len(load)) + 0.5) / len(load)
        label = "_" if place else ""  # matplotlib leaves labels that start with an underscore out of the legend
        extremes.plot(x, load.max(axis=1), color=SERIES[1], label=f"{label}busiest")
        extremes.plot(x, load.min(axis=1), color=SERIES[0], label=f"{label}idlest")
    extremes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="equal shares")
    for end in range(1, len(loads)):
        heat.axvline(end, color=PAPER, linewidth=2)
        extremes.axvline(end, color=GRID, linewidth=1)

    bar = figure.colorbar(image, ax=heat, pad=0.02, fraction=0.05)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    heat.set_title("load of every expert, × an equal share")
    heat.set_ylabel("expert")
    heat.grid(False)
    heat.set_xlim(0, len(loads))
    heat.set_ylim(experts, 0)
    heat.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    extremes.set_ylim(bottom=0)
    extremes.set_xticks(np.arange(len(loads)) + 0.5, names)
    for panel in (heat, extremes):
        panel.tick_params(axis="x", length=0)
    legend(extremes)
    return to_svg(figure, "Heat map of the load of every expert over training")


def _points(rows: Sequence[Row], key: str) -> tuple[NDArray, NDArray] | None:
    """(steps, values) of the rows in which `key` is a finite number."""
    points = [(row["step"], row[key]) for row in rows if _is_number(row.get(key)) and _is_number(row.get("step"))]
    return tuple(np.array(points, dtype=np.float64).T) if points else None


def _lists(rows: Sequence[Row], key: str) -> tuple[NDArray, NDArray] | None:
    """(steps, values (rows, n)) of the rows in which `key` is a list of n finite numbers, n as in the last of them."""
    points = [
        (row["step"], value)
        for row in rows
        if isinstance(value := row.get(key), list) and value and all(map(_is_number, value)) and "step" in row
    ]
    points = [point for point in points if len(point[1]) == len(points[-1][1])]
    return (np.array([step for step, _ in points]), np.array([value for _, value in points])) if points else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thin(steps: NDArray, values: NDArray) -> tuple[NDArray, NDArray]:
    """Means over at most MAX_POINTS equal bins of consecutive points."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    bins = np.array_split(np.arange(len(steps)), MAX_POINTS)
    return np.array([steps[b].mean() for b in bins]), np.array([values[b].mean(axis=0) for b in bins])


def _stacked(panels: Mapping[str, Sequence[tuple[str, NDArray, NDArray]]], x_label: str) -> str:
    """Panels of (label, steps, values) curves, one above the other over one x axis."""
    if not panels:
        return ""
    figure, axes = new_figure(len(panels), height=0.7 + 1.65 * len(panels), sharex=True)
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        for number, (label, steps, values) in enumerate(lines):
            x, y = _thin(steps, values)
            marker = "o" if len(x) <= 24 else None
            panel.plot(x, y, color=SERIES[number % len(SERIES)], label=label, marker=marker, markersize=3.5)
        panel.set_title(title)
        panel.margins(y=0.12)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(4))
        if len(lines) > 1:
            legend(panel)
    axes[-1].set_xlabel(x_label)
    return to_svg(figure, f"{', '.join(panels)} over {x_label}s")


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def metric_name(key: str) -> str:
    """A key of the metrics as people write it: Recall@10, NDCG@10."""
    return key.replace("recall", "Recall").replace("ndcg", "NDCG").replace("_", " ")
