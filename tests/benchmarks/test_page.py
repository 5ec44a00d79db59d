"""The page and the chart of a run."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from genrec.benchmarks.page import raced, render, series, write_chart, write_page
from genrec.benchmarks.results import cases


def test_the_page_holds_every_case_and_who_was_absent(rows, tmp_path):
    write_page(tmp_path / "page.html", rows)
    page = (tmp_path / "page.html").read_text()
    for case in cases(rows):
        assert case.name in page
    assert "faiss-cpu" in page
    assert "6 of 7" in page, "of the comparisons ours is faster in all but the training step"
    assert "0 of 6" in page, "none reaches what was aimed at"
    assert not re.search(r"https?:|src=", re.sub(r"img-src data:", "", page)), "nothing is loaded from anywhere"
    assert page == render(rows), "the same rows, the same bytes"


def test_a_page_without_what_was_not_measured(rows):
    page = render([row for row in rows if row.op in ("training", "overhead")])
    for heading in ("Cost", "Peak memory"):
        assert f"<h2>{heading}</h2>" not in page
    with pytest.raises(ValueError, match="expected at least one"):
        render([row for row in rows if row.contender == "genrec"])


def test_races_that_are_no_comparison_are_in_the_table_alone(rows):
    assert {case.ours.op for case in raced(rows)} == {"group_layer_norm", "training"}


def test_series_have_three_points(rows):
    assert {name: len(group) for name, group in series(cases(rows)).items()} == {"norm": 3, "norm with backward": 3}
    assert not series(cases([row for row in rows if row.at != 64]))


def test_what_moved(rows):
    now = [replace(row, seconds=row.seconds * 2) if row.contender == "genrec" and row.at == 64 else row for row in rows]
    page = render(now, rows)
    assert "8 cases are in both runs; 2 ratios moved by more than 30%." in page
    assert page.count("-50%") == 2
    assert "What moved" not in render(now)


def test_names_cannot_break_the_page(rows):
    page = render([replace(row, case=row.case.replace("norm", "<b>&norm")) for row in rows])
    assert "<b>&norm" not in page


def test_the_chart_is_a_picture_of_its_own(rows, tmp_path):
    write_chart(tmp_path / "chart.svg", rows)
    root = ElementTree.parse(tmp_path / "chart.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = (tmp_path / "chart.svg").read_text()
    assert "Group layer norm, with backward" in text
    assert "prefers-color-scheme: dark" in text
    for variable in set(re.findall(r"var\((--[a-z0-9-]+)\)", text)):
        assert f"{variable}:" in text, "every colour is brought along"
