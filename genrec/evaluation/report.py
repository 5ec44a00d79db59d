"""One self-contained HTML page that shows a run: how good it is, how it learned, what it recommends.

Nothing is loaded from anywhere: style and drawings are in the file. It follows the reader's light or dark mode, fits a
phone and prints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from genrec.data.files import atomic_file
from genrec.evaluation import charts
from genrec.evaluation.charts import metric_name, signed
from genrec.evaluation.metrics import Interval
from genrec.pages.html import card, command_card, facts, page, section

NAMES = {
    "ugt": "UGT",
    "ugt_beam": "UGT, beam only",
    "ugt_item_head": "UGT, item head only",
    "popularity": "Popularity",
    "transition": "Item transitions",
}
STAGES = {
    "pretrain": "next item at every position of every history",
    "finetune": "only the last events, and those the user valued",
    "align": "preferences between the model's own beams (DPO)",
}
HEADLINE = "ndcg@10"
CUTOFFS = (5, 10, 20)


@dataclass(frozen=True)
class Example:
    """What one user had, oldest first, and what the model proposes next, best first."""

    user_id: str
    history: Sequence[str]  # titles
    ratings: Sequence[float]  # one for each title of `history`, NaN where the log has none
    recommended: Sequence[str]  # titles
    scores: Sequence[float]  # one for each title of `recommended`
    next_item: str  # title of what the user really took next
    next_position: int | None  # its place in `recommended`, from 0; None where it is not there


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows; what is empty is left out of the page."""

    title: str
    metrics: Mapping[str, Mapping[str, float]]  # ranker → {"recall@10": …}; the first is the model the page is about
    users: int = 0  # how many were evaluated
    intervals: Mapping[str, Interval] = field(default_factory=dict)  # baseline → ndcg@10 of the model minus its own
    log: Sequence[Mapping[str, object]] = ()  # lines of metrics.jsonl
    examples: Sequence[Example] = ()
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # group → {what: value}
    commands: Sequence[str] = ()


def write_report(path: Path, data: ReportData) -> None:
    """Write the page to `path`, whole or not at all; the same data gives the same bytes."""
    page = render(data)
    with atomic_file(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(data: ReportData) -> str:
    """The page as HTML. Raises ValueError if no ranker has metrics or an example's lists do not match."""
    if not data.metrics:
        raise ValueError("metrics is empty; expected at least one ranker's metrics")
    for example in data.examples:
        _check_example(example)
    stages: dict[str, list[Mapping[str, object]]] = {}
    for row in data.log:
        stages.setdefault(str(row.get("stage", "")), []).append(row)
    tokenize = stages.pop("tokenize", [])
    sections = [
        _summary(data),
        section("How good it is", _metrics_table(data.metrics), _comparison(data)),
        section("What it recommends", *map(_example, data.examples), layout="stack"),
        section(
            "How it learned",
            *[_stage(stage, rows) for stage, rows in stages.items()],
            card("Router load", charts.router_load(stages), _ROUTER_NOTE),
        ),
        section("Semantic ids", *_codebooks(tokenize)),
        section("The run", *facts(data.facts), command_card(data.commands)),
    ]
    return page(data.title, sections)


def verdict(metrics: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Interval]) -> str:
    """One sentence, in words, on where the model stands against each baseline."""
    model = next(iter(metrics))
    if not intervals:
        return f"{_name(model)} has not been compared with a baseline."
    clauses = [
        f"{interval.verdict} {'of ' if interval.verdict != 'behind' else ''}{_name(baseline).lower()} "
        f"({signed(interval.difference)}, 95 % interval {signed(interval.low)} to {signed(interval.high)})"
        for baseline, interval in intervals.items()
    ]
    return f"By {metric_name(HEADLINE)}, {_name(model)} is {' and '.join(clauses)}."


def _summary(data: ReportData) -> str:
    model = next(iter(data.metrics))
    people = f"{data.users:,} users, each with one held-out item" if data.users else "Users with one held-out item each"
    tiles = "".join(
        f'<div class="tile"><b>{data.metrics[model][key]:.4f}</b><span>{metric_name(key)}</span></div>'
        for key in ("recall@10", HEADLINE)
        if key in data.metrics[model]
    )
    badges = "".join(
        f'<div class="tile"><b class="{interval.verdict.split()[0]}">{interval.verdict}</b>'
        f"<span>against {escape(_name(name).lower())}</span></div>"
        for name, interval in data.intervals.items()
    )
    return (
        f"<header><h1>{escape(data.title)}</h1>"
        f'<p class="lead">{escape(verdict(data.metrics, data.intervals))} {people}; the whole catalogue is ranked.</p>'
        f'<div class="tiles">{tiles}{badges}</div></header>'
    )


def _metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    groups = {family: [k for k in CUTOFFS if _any_has(metrics, f"{family}@{k}")] for family in ("recall", "ndcg")}
    keys = [f"{family}@{k}" for family, ks in groups.items() for k in ks]
    best = {key: max(values[key] for values in metrics.values() if key in values) for key in keys}
    families = "".join(
        f"<th scope=colgroup colspan={len(ks)}>{metric_name(family)} at</th>" for family, ks in groups.items() if ks
    )
    cutoffs = "".join(f"<th scope=col>{k}</th>" for ks in groups.values() for k in ks)
    body = "".join(
        f"<tr><th scope=row>{escape(_name(name))}</th>"
        + "".join(_metric_cell(values.get(key), best[key]) for key in keys)
        + "</tr>"
        for name, values in metrics.items()
    )
    return (
        f'<div class="card wide"><div class="scroll"><table><thead><tr><th></th>{families}</tr>'
        f"<tr><th></th>{cutoffs}</tr></thead><tbody>{body}</tbody></table></div>"
        "<p class=note>Mean over users. Bold: best of its column.</p></div>"
    )


def _any_has(metrics: Mapping[str, Mapping[str, float]], key: str) -> bool:
    return any(key in values for values in metrics.values())


def _metric_cell(value: float | None, best: float) -> str:
    if value is None:
        return "<td>–</td>"
    digits = f"{value:.4f}".removeprefix("0")
    return f"<td class=best>{digits}</td>" if value == best else f"<td>{digits}</td>"


def _comparison(data: ReportData) -> str:
    names = {name: _name(name) for name in (*data.metrics, *data.intervals)}
    keys = [key for key in ("recall@10", HEADLINE) if _any_has(data.metrics, key)]
    drawn = charts.bars(data.metrics, names, keys) if keys else ""
    differences = charts.differences(data.intervals, names, HEADLINE) if data.intervals else ""
    return card("All rankers", drawn) + card("The model minus each baseline", differences, _INTERVAL_NOTE)


def _stage(stage: str, rows: Sequence[Mapping[str, object]]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    panels = {
        "loss": {key: key.removeprefix("loss_").replace("loss", "total") for key in keys if key.startswith("loss")},
        "validation": {f"valid_{key}": metric_name(key) for key in (HEADLINE, "recall@10")},
        "preferences won": {"preference_accuracy": "share"},
    }
    return card(stage.capitalize(), charts.curves(rows, panels), STAGES.get(stage, ""))


def _codebooks(rows: Sequence[Mapping[str, object]]) -> list[str]:
    usage = charts.levels(rows, {"share of codes in use": "usage", "perplexity": "perplexity"})
    residual = charts.levels(rows, {"variance left": "residual"})
    decoded = charts.curves(rows, {"error of the decoded features": {"reconstruction": "error"}}, "epoch")
    return [
        card("Codebook usage", usage, "Perplexity: how many equally used codes would be as varied."),
        card("Reconstruction", residual + decoded, "Squared errors, as shares of the variance."),
    ]


def _example(example: Example) -> str:
    history = "".join(
        f"<li><span>{escape(title)}</span>{_stars(rating)}</li>"
        for title, rating in zip(example.history, example.ratings, strict=True)
    )
    low, high = min(example.scores, default=0.0), max(example.scores, default=0.0)
    recommended = "".join(
        f"<li{' class=hit' if place == example.next_position else ''}><span>{escape(title)}"
        f"{'<em>taken next</em>' if place == example.next_position else ''}</span>{_score(score, low, high)}</li>"
        for place, (title, score) in enumerate(zip(example.recommended, example.scores, strict=True))
    )
    outcome = (
        f"Really taken next: <b>{escape(example.next_item)}</b>, number {example.next_position + 1} of the list."
        if example.next_position is not None
        else f"Really taken next: <b>{escape(example.next_item)}</b>, not in the list."
    )
    return (
        f'<div class="card wide example"><h3>User {escape(example.user_id)}</h3><div class="columns">'
        f"<div><h4>had, latest last</h4><ul>{history}</ul></div>"
        f"<div><h4>is recommended</h4><ol>{recommended}</ol></div></div>"
        f"{f'<p class=note>{outcome}</p>' if example.next_item else ''}</div>"
    )


def _stars(rating: float) -> str:
    return f'<span class="rating">{rating:g}&#8202;★</span>' if math.isfinite(rating) else ""


def _score(score: float, low: float, high: float) -> str:
    """The number and a bar from a fifth (the list's lowest) to full width (its highest)."""
    share = 0.2 + 0.8 * (score - low) / (high - low) if high > low else 1.0
    return f'<span class="score"><i style="width:{share:.0%}"></i>{score:.2f}</span>'


def _name(ranker: str) -> str:
    return NAMES.get(ranker, ranker)


def _check_example(example: Example) -> None:
    lengths = [len(example.history), len(example.ratings), len(example.recommended), len(example.scores)]
    if lengths[0] != lengths[1] or lengths[2] != lengths[3]:
        raise ValueError(
            f"example of user {example.user_id} has {lengths[0]} history titles with {lengths[1]} ratings and "
            f"{lengths[2]} recommended titles with {lengths[3]} scores; expected one number for each title"
        )


_INTERVAL_NOTE = "Paired bootstrap over users, 95 %. An interval that holds zero is noise."
_ROUTER_NOTE = "Mean over layers. 1 is an equal share; an expert near 0 has died."
