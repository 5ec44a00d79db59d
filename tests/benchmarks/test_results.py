"""The table of a run: written and read, and the ratios that follow from it."""

import math
from dataclasses import replace

import pytest

from genrec.benchmarks.results import Row, absent, cases, changes, read_results, write_results


def same(a: Row, b: Row) -> bool:
    return all(x == y or (x != x and y != y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_what_is_written_is_read(rows, tmp_path):
    write_results(tmp_path / "table.csv", rows)
    read = read_results(tmp_path / "table.csv")
    assert len(read) == len(rows)
    assert all(map(same, read, rows))


def test_ratios(rows):
    found = {case.name: case for case in cases(rows)}
    assert "alone" not in found, "a case without a peer is none"
    norm = found["norm 1000×64"]
    assert norm.peer.contender == "compiled"
    assert norm.ratio == pytest.approx(1.5)
    assert norm.ratio_to(["eager"]) == pytest.approx(2.0)
    assert math.isnan(norm.ratio_to(["nobody"]))
    assert norm.memory_ratio == pytest.approx(1.5)
    assert norm.share(norm.ours) == pytest.approx(8e3 * 64 / 2e10 / 64e-6), "bound by bytes"
    assert math.isnan(found["training step"].share(found["training step"].ours))
    assert math.isnan(found["training step"].memory_ratio)
    assert absent(rows) == ["faiss-cpu"]


def test_a_slower_machine_is_no_change(rows):
    slower = [replace(row, seconds=3 * row.seconds) for row in rows]
    assert {round(change.factor, 6) for change in changes(rows, slower)} == {1.0}


def test_a_ratio_that_fell(rows):
    now = [
        replace(row, seconds=2 * row.seconds) if row.contender == "genrec" and row.case == "norm 1000×64" else row
        for row in rows
    ]
    fell = [change for change in changes(rows, now) if change.fell(0.3)]
    assert [change.case.name for change in fell] == ["norm 1000×64"]
    assert (fell[0].before, fell[0].now) == (pytest.approx(1.5), pytest.approx(0.75))
    assert not [change for change in changes(now, rows) if change.fell(0.3)], "faster is no fall"
    assert not fell[0].fell(0.51)


def test_a_peer_of_one_run_alone_does_not_count(rows):
    with_faster = [*rows, replace(rows[0], contender="new", seconds=rows[0].seconds / 10)]
    assert {round(change.factor, 6) for change in changes(rows, with_faster)} == {1.0}
    assert not changes(rows, [row for row in rows if row.contender in ("genrec", "nobody")])


def test_no_number_is_a_fall(rows):
    broken = [replace(row, seconds=math.nan) if row.contender == "genrec" else row for row in rows]
    assert all(change.fell(0.3) for change in changes(rows, broken))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: "", "has no column op"),
        (lambda text: text.replace("seconds,", "time,", 1), "has no column seconds"),
        (lambda text: text.splitlines()[0] + "\n", "has no rows"),
        (lambda text: text.replace(",0.1,", ",fast,", 1), "line 2: spread is 'fast'; expected a number"),
        (lambda text: text + "norm,case\n", "ends before series"),
    ],
)
def test_a_broken_table_is_refused(rows, tmp_path, edit, words):
    path = tmp_path / "table.csv"
    write_results(path, rows)
    path.write_text(edit(path.read_text()))
    with pytest.raises(ValueError, match=str(path)) as caught:
        read_results(path)
    assert words in str(caught.value)


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the table of pytest"):
        read_results(tmp_path / "none.csv")
