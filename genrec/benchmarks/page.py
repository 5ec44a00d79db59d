"""One page of charts for a benchmark run, and for what changed since another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from genrec.benchmarks import charts
from genrec.benchmarks.results import Case, Change, Row, absent, cases, changes
from genrec.data.files import atomic_file
from genrec.pages.drawing import standalone
from genrec.pages.html import card, facts, page, section

APART = ("overhead",)  # races that are no comparison: their contenders compute different things
SHORTEST_SERIES = 3


def write_page(path: Path, results: Sequence[Row], baseline: Sequence[Row] = (), tolerance: float = 0.3) -> None:
    """Write the page, whole or not at all; with a baseline it says which ratios moved."""
    with atomic_file(path) as temporary:
        temporary.write_text(render(results, baseline, tolerance), encoding="utf-8")


def write_chart(path: Path, results: Sequence[Row]) -> None:
    """The overview alone, as an SVG for a README."""
    with atomic_file(path) as temporary:
        temporary.write_text(standalone(charts.overview(raced(results))), encoding="utf-8")


def raced(results: Sequence[Row]) -> list[Case]:
    """Cases in which a peer computes the same."""
    return [case for case in cases(results) if case.ours.op not in APART and "softmax" not in case.name]


def render(results: Sequence[Row], baseline: Sequence[Row] = (), tolerance: float = 0.3) -> str:
    """The page as HTML. Raises ValueError where no case has both genrec and a peer."""
    found = cases(results)
    if not found:
        raise ValueError("results hold no case with genrec and a peer; expected at least one")
    moved = {change.case.name: change for change in changes(baseline, results)}
    compared = raced(results)
    by_op: dict[str, list[Case]] = {}
    for case in compared:
        by_op.setdefault(case.ours.op, []).append(case)
    sections = [
        _summary(found[0].ours, compared),
        section("Overview", card("By operator", charts.overview(compared), _OVERVIEW_NOTE, wide=True)),
        section("What moved", _moved(list(moved.values()), tolerance)),
        section(
            "Speed",
            *(card(charts.title_of(op), charts.ratios(group, moved), _RATIO_NOTE, wide=True)
              for op, group in by_op.items()),
        ),
        section("Share of the machine", *(
            card(charts.title_of(op), charts.roofline(group)) for op, group in by_op.items()
        ), layout="grid"),
        section("Cost", *(card(name, charts.costs(name, group)) for name, group in series(compared).items())),
        section("Peak memory", *(
            card(charts.title_of(op), charts.ratios(_measured(group), {}, "memory"), _MEMORY_NOTE, wide=True)
            for op, group in by_op.items() if _measured(group)
        )),
        section("Every case", _table(found)),
        section("The run", *facts(_facts(results))),
    ]  # fmt: skip
    return page("genrec benchmarks", sections)


def series(found: Sequence[Case]) -> dict[str, list[Case]]:
    """Cases that run along an axis, where there are enough for a curve."""
    groups: dict[str, list[Case]] = {}
    for case in found:
        if case.ours.series:
            groups.setdefault(case.ours.series, []).append(case)
    return {name: group for name, group in groups.items() if len({c.ours.at for c in group}) >= SHORTEST_SERIES}


def _measured(group: Sequence[Case]) -> list[Case]:
    """Cases whose memory is large enough to be compared: the kernel counts in pages, and threads in dozens of them."""
    return [case for case in group if case.ours.memory >= 1 << 20 and math.isfinite(case.memory_ratio)]


def _summary(row: Row, compared: Sequence[Case]) -> str:
    threads = f", {row.threads:g} threads" if row.threads else ""
    faster = sum(case.ratio >= 1 for case in compared)
    aimed = [case for case in compared if math.isfinite(case.ours.goal)]
    reached = sum(case.ratio >= case.ours.goal for case in aimed)
    tiles = {
        f"{faster} of {len(compared)}": "cases faster than the strongest peer",
        f"{reached} of {len(aimed)}": "cases that reach what was aimed at",
        f"{row.matmul_rate / 1e9:,.0f} GFLOP/s": "matrix product of this device, float32",
        f"{row.copy_rate / 1e9:,.0f} GB/s": "copy of this device",
    }
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for value, what in tiles.items())
    return (
        f"<header><h1>genrec benchmarks</h1><p class=lead>{escape(row.device)}{threads}, torch {escape(row.torch)}, "
        f"{escape(row.date)}. Ours and its peers took turns in one run; a speed is shown only where the results agree."
        f'</p><div class="tiles">{shown}</div></header>'
    )


def _moved(found: Sequence[Change], tolerance: float) -> str:
    if not found:
        return ""
    out = sorted((change for change in found if abs(math.log(change.factor)) > -math.log(1 - tolerance)),
                 key=lambda change: change.factor)  # fmt: skip
    rows = "".join(
        f"<tr><th scope=row>{escape(change.case.name)}</th><td>{change.before:.2f}×</td><td>{change.now:.2f}×</td>"
        f'<td class="{"behind" if change.fell(tolerance) else "ahead"}">{change.factor - 1:+.0%}</td></tr>'
        for change in out
    )
    note = f"{len(found)} cases are in both runs; {len(out)} ratios moved by more than {tolerance:.0%}."
    head = "<thead><tr><th></th><th>before</th><th>now</th><th>ratio</th></tr></thead>" if out else ""
    body = f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>' if out else ""
    return f'<div class="card wide">{body}<p class=note>{note}</p></div>'


def _table(found: Sequence[Case]) -> str:
    heads = ("", "genrec", "± IQR", "strongest peer", "", "ratio", "GFLOP/s", "GB/s", "share", "memory", "peer's")
    rows = "".join(
        f"<tr><th scope=row>{escape(case.name)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(case))
        + "</tr>"
        for case in found
    )
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in heads)
    table = f"<table class=dense><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="card wide"><div class="scroll">{table}</div><p class=note>{escape(_TABLE_NOTE)}</p></div>'


def _cells(case: Case) -> list[str]:
    ours, share = case.ours, case.share(case.ours)
    return [
        _time(ours.seconds), _percent(ours.spread), case.peer.contender, _time(case.peer.seconds), f"{case.ratio:.2f}×",
        _rate(ours.flops, ours.seconds), _rate(ours.bytes, ours.seconds), _percent(share), _size(ours.memory),
        "" if math.isnan(case.memory_ratio) else f"{case.memory_ratio:.1f}×",
    ]  # fmt: skip


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _rate(work: float, seconds: float) -> str:
    return "" if math.isnan(work) else f"{work / seconds / 1e9:.3g}"


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.0%}"


def _size(memory: float) -> str:
    return "" if math.isnan(memory) else f"{memory / 2**20:.1f} MB"


def _facts(results: Sequence[Row]) -> Mapping[str, Mapping[str, str]]:
    row = results[0]
    machine = {"device": row.device, "torch": row.torch, "date": row.date}
    if row.threads:
        machine["threads"] = f"{row.threads:g}"
    missing = absent(results)
    peers = sorted({row.contender for case in cases(results) for row in case.peers})
    return {
        "Machine": machine,
        "Peers": {"raced": ", ".join(peers), "absent, not installed": ", ".join(missing) or "none"},
    }


_OVERVIEW_NOTE = "A dot is a case, the line the median of a row. Blue: forward alone. Green: with all gradients."
_RATIO_NOTE = (
    "Medians. Green: with backward; orange: behind; grey: level. A tick is what was aimed at, a ring the run that "
    "is compared with."
)
_MEMORY_NOTE = "Peak above what is held before the call: how many times ours the most frugal peer takes."
_TABLE_NOTE = (
    "Share: of the time that the device's own matrix product and copy take for the same FLOPs or bytes, whichever is "
    "longer. Memory: peak above what is held before the call; peer's: how many times that the most frugal peer takes."
)
