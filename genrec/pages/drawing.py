"""matplotlib drawings as inline SVG whose colours follow the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from genrec.pages.style import CSS

# matplotlib draws in these colours; the page replaces each by a variable, so that one drawing serves light and dark.
INK, MUTED, GRID, PAPER = "#010203", "#020304", "#030405", "#040506"
SERIES = ("#050607", "#060708", "#070809", "#08090a", "#090a0b", "#0a0b0c")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}


_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11.5,
    "text.parse_math": False,  # a $ in a name is a dollar
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.9,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "legend.labelcolor": MUTED,
    "legend.fontsize": 10.5,
}
styled = matplotlib.rc_context(_STYLE)  # as a decorator: holds while the function draws


def new_figure(
    panels: int,
    height: float,
    sharex: bool = False,
    height_ratios: Sequence[float] | None = None,
    width: float = 5.2,
) -> tuple[Figure, list[Axes]]:
    """Panels one above the other; height and width in inches, of which a card of the page is 5.2 wide."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=sharex, squeeze=False, height_ratios=height_ratios)
    return figure, list(axes[:, 0])


def to_svg(figure: Figure, description: str) -> str:
    """The figure as an `<svg>` element without ids of its own making, metadata or addresses; the same every time."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| id="[A-Za-z0-9.]+_\d+"| width="[\d.]+pt"| height="[\d.]+pt"', "", svg)
    svg = re.sub(r"font-family:[^;\"]*|font: ([\d.]+px)[^;\"]*", _page_font, svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


def standalone(svg: str) -> str:
    """An SVG of `to_svg` as a file of its own, which brings the colours of the page along."""
    style = re.findall(r"(?:@media \(prefers[^{]*\{ )?:root \{[^}]*\}(?: \})?", CSS)
    paper = '<rect width="100%" height="100%" fill="var(--card)"/>'
    head, rest = svg.split(">", 1)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    font = "svg { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }"
    return f"{head} {names}><style>{font} {' '.join(style)}</style>{paper}{rest}"


def _page_font(match: re.Match[str]) -> str:
    return f"font-size: {match[1]}; font-family: inherit" if match[1] else "font-family: inherit"


def legend(panel: Axes) -> None:
    """Above the panel, right, where no curve can run through it."""
    panel.legend(
        loc="lower right",
        bbox_to_anchor=(1.02, 0.98),
        ncols=len(panel.get_legend_handles_labels()[0]),
        frameon=False,
        handlelength=1.1,
        handletextpad=0.4,
        columnspacing=1.1,
        borderpad=0.1,
    )
