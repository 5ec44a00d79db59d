from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser

import pytest

from genrec.evaluation.metrics import Interval
from genrec.evaluation.report import Example, ReportData, render, verdict, write_report

EVIL = '<script src="//evil/x.js"></script>&<b>'


def metrics(scale: float) -> dict[str, float]:
    return {f"{name}@{k}": scale * k / 100 for k in (5, 10, 20) for name in ("recall", "ndcg")} | {"coverage": 0.3}


def log() -> list[dict]:
    rows: list[dict] = [
        {"stage": "tokenize", "step": epoch, "usage": [0.9, 0.8], "perplexity": [9.0, 7.0 + epoch],
         "residual": [0.5, 0.2], "reconstruction": 0.3, "revived": 0}
        for epoch in range(4)
    ]  # fmt: skip
    for stage in ("pretrain", "finetune", "align"):
        rows += [
            {"stage": stage, "step": step, "loss": 5 - step / 400, "loss_ids": 3.0, "expert_load": [0.5, 0.25, 0.25]}
            for step in range(0, 1200, 2)
        ]
        rows += [{"stage": stage, "step": 600, "valid_ndcg@10": 0.1, "valid_recall@10": 0.2, "valid_recall@5": 0.1}]
    return rows


def example(**changes) -> Example:
    first = Example(
        "17", ["Heat (1995)", "Big (1988)"], [4.5, math.nan], ["Ran (1985)", "Ali (2001)"], [2.0, 1.0], "Ali (2001)", 1
    )
    return dataclasses.replace(first, **changes)


@pytest.fixture(scope="module")
def full() -> ReportData:
    return ReportData(
        title="genrec on MovieLens",
        metrics={"ugt": metrics(1.0), "ugt_beam": metrics(0.8), "popularity": metrics(0.4), "transition": metrics(1.1)},
        users=671,
        intervals={"popularity": Interval(0.06, 0.04, 0.08), "transition": Interval(-0.01, -0.02, 0.003)},
        log=log(),
        examples=[example()],
        facts={"Data": {"users": "671"}, "Wall time": {"pretrain": "132 s"}},
        commands=["genrec evaluate --config configs/a.yaml"],
    )


@pytest.fixture(scope="module")
def page(full) -> str:
    return render(full)


class Checker(HTMLParser):
    """Notes what a browser would load, and fails where tags are not closed in order."""

    VOID = frozenset(["meta", "br", "path", "use", "rect", "image"])

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def external(self) -> list[str]:
        return [address for address in self.addresses if not address.startswith(("#", "data:image/png;base64,"))]


def headings(page: str, level: int) -> list[str]:
    return re.findall(rf"<h{level}>(.*?)</h{level}>", page)


def test_the_page_has_every_section(page):
    assert headings(page, 2) == ["How good it is", "What it recommends", "How it learned", "Semantic ids", "The run"]
    assert headings(page, 3) == [
        "All rankers", "The model minus each baseline", "User 17", "Pretrain", "Finetune", "Align", "Router load",
        "Codebook usage", "Reconstruction", "Data", "Wall time", "Commands",
    ]  # fmt: skip
    for text in (
        "Heat (1995)",
        "4.5&#8202;★",
        "taken next",
        "number 2 of the list",
        "132 s",
        "configs/a.yaml",
        "671 users",
    ):
        assert text in page


def test_the_page_loads_nothing_from_outside(page):
    checker = Checker(page)
    assert checker.open == []
    assert checker.external() == []
    assert not re.search(r"https?:|url\((?!#)|@import|<script|<link|<iframe", page)
    assert checker.tags.count("svg") == 9


def test_drawings_follow_light_and_dark(page):
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", drawings)) <= {"#ffffff", "#000000"}
    assert "stroke: var(--series-0)" in drawings
    assert "prefers-color-scheme: dark" in page


def test_the_best_of_every_column_is_bold(page):
    rows = re.findall(r"<tr><th scope=row>(.*?)</th>(.*?)</tr>", page)
    assert [name for name, _ in rows] == ["UGT", "UGT, beam only", "Popularity", "Item transitions"]
    assert [cells.count("class=best") for _, cells in rows] == [0, 0, 0, 6]
    assert re.findall(r">([^<]+)</td>", rows[0][1]) == [".0500", ".1000", ".2000"] * 2


def test_everything_from_outside_is_escaped(full):
    evil = ReportData(
        title=EVIL,
        metrics={EVIL: metrics(1.0), "popularity": metrics(0.4)},
        intervals={EVIL: Interval(0.1, 0.0, 0.2)},
        log=[
            {"stage": EVIL, "step": step, "loss": 1.0, "loss_" + EVIL: 2.0, "expert_load": [1.0]} for step in range(3)
        ],
        examples=[
            example(user_id=EVIL, history=[EVIL], ratings=[5.0], recommended=[EVIL], scores=[1.0], next_item=EVIL)
        ],
        facts={EVIL: {EVIL: EVIL}},
        commands=[EVIL],
    )
    page = render(evil)
    checker = Checker(page)
    assert checker.open == []
    assert "script" not in checker.tags
    assert checker.external() == []
    assert "&lt;script src=" in page


@pytest.mark.parametrize(
    ("missing", "headings_left_out"),
    [
        ({"log": ()}, ["Pretrain", "Finetune", "Align", "Router load", "Codebook usage", "Reconstruction"]),
        ({"log": (), "examples": ()}, ["User 17"]),
        ({"log": (), "intervals": {}}, ["The model minus each baseline"]),
        ({"log": (), "facts": {}, "commands": ()}, ["Data", "Wall time", "Commands"]),
    ],
)
def test_what_is_missing_is_left_out(full, page, missing, headings_left_out):
    without = render(dataclasses.replace(full, **missing))
    assert Checker(without).open == []
    assert set(headings_left_out) <= set(headings(page, 3)) - set(headings(without, 3))


def test_a_run_without_tokenize_metrics_keeps_its_curves(full):
    rows = [row for row in full.log if row["stage"] == "pretrain"][::40]
    page = render(dataclasses.replace(full, log=rows))
    assert headings(page, 2) == ["How good it is", "What it recommends", "How it learned", "The run"]


def test_metrics_alone_make_a_page():
    page = render(ReportData(title="bare", metrics={"ugt": {"recall@7": 0.1}}))
    assert headings(page, 2) == ["How good it is"]
    assert Checker(page).open == []


def test_a_log_with_gaps_is_drawn():
    rows: list[dict] = [
        {"stage": "pretrain", "step": 1, "loss": math.nan, "expert_load": []},
        {"stage": "pretrain", "step": 2, "loss": "high", "expert_load": [0.5, math.inf]},
        {"stage": "pretrain", "loss": 2.0},
        {"step": 3},
        {"stage": "pretrain", "step": 3, "loss": 2.5, "expert_load": [0.5, 0.5]},
        {"stage": "align", "step": 3, "expert_load": [0.2, 0.3, 0.5]},
        {"stage": "tokenize", "step": 0, "usage": [0.5]},
    ]
    page = render(ReportData(title="gaps", metrics={"ugt": metrics(1)}, log=rows))
    assert headings(page, 3) == ["All rankers", "Pretrain", "Router load", "Codebook usage"]


def test_the_verdict_says_where_the_model_stands(full):
    assert verdict(full.metrics, full.intervals) == (
        "By NDCG@10, UGT is ahead of popularity (+0.0600, 95 % interval +0.0400 to +0.0800) and within noise of item "
        "transitions (−0.0100, 95 % interval −0.0200 to +0.0030)."
    )
    behind = verdict(full.metrics, {"transition": Interval(-0.01, -0.02, -0.003)})
    assert "UGT is behind item transitions (−0.0100" in behind
    assert verdict(full.metrics, {}) == "UGT has not been compared with a baseline."


def test_the_same_data_gives_the_same_file(full, page, tmp_path):
    write_report(tmp_path / "runs" / "report.html", full)
    assert (tmp_path / "runs" / "report.html").read_bytes() == page.encode()
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["report.html"]


def test_wrong_data_is_named(full, tmp_path):
    with pytest.raises(ValueError, match="metrics is empty; expected at least one ranker"):
        write_report(tmp_path / "report.html", ReportData(title="none", metrics={}))
    with pytest.raises(ValueError, match="user 17 has 2 history titles with 1 ratings and 2 recommended titles with 2"):
        render(dataclasses.replace(full, examples=[example(ratings=[5.0])]))
    assert list(tmp_path.iterdir()) == []
