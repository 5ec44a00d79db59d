"""One log in every format, odd but legal files, and files that must be refused."""

import csv
import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data.build import build_features
from genrec.data.catalogue import load_catalogue
from genrec.data.config import FeaturesConfig

EVENTS = [("u1", "b", 4.0, 30), ("u1", "a", 1.5, 10), ("u2", "a", 3.0, 5), ("u1", "c", 5.0, 10), ("u2", "b", 2.0, 7)]
EXPECTED = {
    "u1": [("a", 1.5, 10), ("c", 5.0, 10), ("b", 4.0, 30)],  # by time, ties as in the file
    "u2": [("a", 3.0, 5), ("b", 2.0, 7)],
}


def delimited(delimiter, header, rows):
    return "\n".join(delimiter.join(map(str, row)) for row in [header, *rows]) + "\n"


LOGS = {
    "comma.csv": delimited(",", ("userId", "movieId", "rating", "timestamp"), EVENTS),
    "semicolon.csv": delimited(";", ("User", "Item", "Score", "Time"), EVENTS),
    "tab.tsv": delimited("\t", ("user_id", "asin", "overall", "unixReviewTime"), EVENTS),
    "bar.csv": delimited("|", ("user_id", "item_id", "rating", "timestamp"), EVENTS),
    "recbole.inter": delimited("\t", ("user_id:token", "item_id:token", "rating:float", "timestamp:float"), EVENTS),
    "lines.jsonl": "\n".join(
        json.dumps({"user_id": u, "item_id": i, "rating": r, "timestamp": t}) for u, i, r, t in EVENTS
    ),
    "windows.csv": delimited(",", ("user", "item", "rating", "time"), EVENTS).replace("\n", "\r\n"),
    "mark.csv": b"\xef\xbb\xbf" + delimited(",", ("user", "item", "rating", "time"), EVENTS).encode(),
    "blank.csv": delimited(",", ("user", "item", "rating", "time"), EVENTS).replace("\n", "\n\n"),
    "no_end.csv": delimited(",", ("user", "item", "rating", "time"), EVENTS)[:-1],
    "millis.csv": delimited(",", ("user", "item", "rating", "time"), [(*e[:3], 10**12 + e[3] * 1000) for e in EVENTS]),
    "micros.csv": delimited(",", ("user", "item", "rating", "time"), [(*e[:3], 10**15 + e[3] * 10**6) for e in EVENTS]),
    "nanos.csv": delimited(",", ("user", "item", "rating", "time"), [(*e[:3], 10**18 + e[3] * 10**9) for e in EVENTS]),
    "floats.csv": delimited(",", ("user", "item", "rating", "time"), [(*e[:3], f"{e[3]}.0") for e in EVENTS]),
}


@pytest.mark.parametrize("name", LOGS)
def test_log_formats(build, read_back, name):
    directory, summary = build({name: LOGS[name]}, name)
    start = 10**9 if name.split(".")[0] in ("millis", "micros", "nanos") else 0
    expected = {u: [(i, r, t + start) for i, r, t in events] for u, events in EXPECTED.items()}
    assert read_back(directory) == expected
    assert (summary["users"], summary["items"], summary["events"]) == (2, 3, 5)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("X.inter.json", json.dumps({"u1": [7, "b", 7], "u2": ["b"]})),
        ("lists.txt", "u1 7 b\t7 \n\nu2  b\r\n"),
        ("order.csv", "user,item\nu1,7\nu1,b\nu2,b\nu1,7\n"),
    ],
)
def test_logs_without_times_keep_their_order(build, read_back, name, content):
    directory, _ = build({name: content}, name)
    assert read_back(directory) == {"u1": [("7", None, 0), ("b", None, 0), ("7", None, 0)], "u2": [("b", None, 0)]}


LOG = "user,item\n" + "".join(f"u{u},{item}\n" for u in range(3) for item in ("a", "b", "c"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("i.csv", 'item_id,title,genre,year\na,"Alpha, the ""first""",Crime film,1990\nb,Beta,Crime story,1990\n'),
        (
            "i.jsonl",
            '{"asin":"a","title":"Alpha, the \\"first\\"","genre":["Crime","film"]}\n{"asin":"b","title":"Beta"}',
        ),
        ("i.item", 'item_id:token\ttitle:token_seq\tyear:float\na\tAlpha, the "first"\t1990\nb\tBeta\t1991\n'),
        ("i.item.json", '{"a":{"title":"Alpha, the \\"first\\"","genre":["Crime"]},"b":{"title":"Beta","x":null}}'),
    ],
)
def test_item_formats(build, name, content):
    directory, _ = build({"log.csv": LOG, name: content}, "log.csv", items=name)
    catalogue = load_catalogue(directory)
    assert dict(zip(catalogue.item_ids, catalogue.titles, strict=True)) == {
        "": "", "a": 'Alpha, the "first"', "b": "Beta", "c": "c",
    }  # fmt: skip


fields = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)
ALWAYS = [("last", "x", ""), ("last", "y", "")]  # two items that co-occur, so that there are features
ids = fields.filter(lambda text: text.strip() != "")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(ids, ids, fields), min_size=1, max_size=12), st.sampled_from([",", ";", "\t", "|"]))
def test_quoted_fields(tmp_path_factory, read_back, rows, delimiter):
    """Whatever the csv module writes, with delimiters, quotes and line ends inside fields, is read back."""
    directory = tmp_path_factory.mktemp("csv")
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(["user", "item", "note"])
    writer.writerows([*rows, *ALWAYS])
    (directory / "log.csv").write_bytes(text.getvalue().encode())
    expected = {}
    for user, item, _ in [*rows, *ALWAYS]:
        expected.setdefault(user, []).append((item, None, 0))
    build_features(FeaturesConfig(directory / "log.csv", directory / "out", min_events=1, holdout=0, threads=1))
    assert read_back(directory / "out") == expected


BAD_LINES = [
    ("1,2", "has 2 columns, expected 4"),
    ("1,2,3,4,5", "has 5 columns, expected 4"),
    ("1,31,abc,5", "has rating abc, expected a number"),
    ("1,31,nan,5", "has rating nan, expected a number"),
    ("1,31,1e99,5", "has rating 1e99, expected a number"),
    ("1,31,3,soon", "has time soon, expected unix seconds"),
    ("1,31,3,", "has time (empty), expected unix seconds"),
    (",31,3,5", "has no user"),
    ("1,,3,5", "has no item"),
    ("1,  ,3,5", "has no item"),
    ('1,31,3,5"', "has a stray double quote"),
    ('1,"31"x,3,5', "has a stray double quote"),
    ('1,31,3,"5', "has a stray double quote"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES)
def test_malformed_lines_are_refused_or_skipped(build, read_back, line, problem):
    good = delimited(",", ("user", "item", "rating", "time"), EVENTS).splitlines()
    content = "\n".join([*good[:3], line, *good[3:]])
    example = f"log.csv line 4 {problem}: {line!r}"
    message = f"1 malformed line, more than max_malformed 0 allows: {example}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build({"log.csv": content}, "log.csv")
    directory, summary = build({"log.csv": content}, "log.csv", max_malformed=1)
    assert (summary["malformed_lines"], summary["malformed_examples"]) == (1, [example])
    assert read_back(directory) == EXPECTED


def test_malformed_lines_are_counted_and_the_first_few_quoted(build):
    content = "user,item\n" + "u,a\n,b\n" * 20 + "u,b\n"
    with pytest.raises(ValueError, match=r"^20 malformed lines, more than max_malformed 19") as error:
        build({"log.csv": content}, "log.csv", max_malformed=19)
    assert re.findall(r"line (\d+) has no user", str(error.value)) == ["3", "5", "7", "9", "11"]
    assert build({"log.csv": content}, "log.csv", max_malformed=20)[1]["malformed_lines"] == 20


def test_line_numbers_count_the_lines_inside_quotes(build):
    content = 'user,item,note\nu,a,"one\ntwo ""x""\n\nthree"\nu,b\n'
    with pytest.raises(ValueError, match=r"log\.csv line 6 has 2 columns, expected 3: 'u,b'"):
        build({"log.csv": content}, "log.csv")


def test_a_quote_left_open_costs_one_line(build, read_back):
    content = "user,item\n" + 'u,"a\n' + "u,b\nu,c\n" * 750
    directory, summary = build({"log.csv": content}, "log.csv", max_malformed=1, rating="")
    assert summary["malformed_lines"] == 1
    assert len(read_back(directory)["u"]) == 200
    assert summary["cut_events"] == 1300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"user":1,"item":2}\n{"user":', "log.jsonl line 2 is not a JSON object"),
        ('{"user":1,"item":2}\n[1,2]', "log.jsonl line 2 is not a JSON object"),
        ('{"user":1,"item":2}\n{"user":1}', "log.jsonl line 2 has no item"),
        ('{"user":1,"item":2}\n{"user":null,"item":2}', "log.jsonl line 2 has no user"),
        ("1\n2\n", "holds no JSON object; expected one a line, not '1'"),
        ("", "is empty; expected one JSON object a line"),
    ],
)
def test_json_lines_refusals(build, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build({"log.jsonl": content}, "log.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"u":[1,2],"v":3}', "line 3 gives user 'v' no list of items: '3'"),
        ('{"u":[1,null]}', "line 2 gives user 'u' an item that is neither text nor a whole number: 'None'"),
        ('{"u":[1,""]}', "line 2 has no item"),
        ('{"u":[1,\n2', "line 2 is not JSON"),
        ("[1]", "holds no JSON object; expected user → [item, …]"),
        ("{}", "holds no JSON object"),
        ('{"u":[1],"v":[2],"u":[3]}', "has the key 'u' twice"),
        (b"\xff", "is not UTF-8"),
        ('{"u":["\\ud800"]}', "X.inter.json holds half of a surrogate pair"),
        ('{"u":' + "[" * 100_000, "X.inter.json is nested too deeply"),
    ],
)
def test_user_list_refusals(build, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build({"X.inter.json": content}, "X.inter.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "log.csv is empty"),
        ("\n\n", "log.csv is empty"),
        ("user,item\n", "log.csv has no usable events"),
        ("a,b,c\n1,2,3\n", "cannot tell which column is the user; pass --user with one of 'a', 'b', 'c'"),
        ("user,b,c\n1,2,3\n", "cannot tell which column is the item; pass --item with one of 'user', 'b', 'c'"),
        ("user,item,user\n1,2,3\n", "the header names column 'user' twice"),
        ("user,item,\n1,2,3\n", "the header leaves a column without a name"),
        (b"user,item\nu,\xe9\n", "log.csv line 2 is not UTF-8; convert the file"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "is not UTF-8"),
        ("user,item\nu,a\n".encode("utf-16"), "line 1 holds a NUL byte; expected a UTF-8 text file"),
        ("user,item\nu,a\nu,b\n", "no user has min_events = 3 events; the longest history has 2"),
    ],
)
def test_refused_files(build, tmp_path, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build({"log.csv": content}, "log.csv", min_events=3)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]  # nothing is left behind


def test_refused_names(build, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        build({}, "none.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no files"):
        build({}, "empty")
    with pytest.raises(FileNotFoundError, match=r"\*\.csv matches no file"):
        build({}, "*.csv")
    with pytest.raises(ValueError, match=r"unknown format; expected a name ending in one of \.inter\.json, "):
        build({"log.xlsx": "user,item\n"}, "log.xlsx")
    with pytest.raises(ValueError, match=r"log\.parquet is not a readable Parquet file"):
        build({"log.parquet": "user,item\n"}, "log.parquet")
    with pytest.raises(ValueError, match=r"log\.csv has no column 'who' for user; its columns are 'user', 'item'"):
        build({"log.csv": LOG}, "log.csv", user="who")
    with pytest.raises(ValueError, match=r"log\.csv: column 'item' cannot be both user and item"):
        build({"log.csv": LOG}, "log.csv", user="item")


def test_a_parquet_file_with_a_damaged_page_is_named(build):
    rows = pa.table({"user": [f"u{i % 500}" for i in range(20_000)], "item": [f"i{i % 300}" for i in range(20_000)]})
    written = io.BytesIO()
    pq.write_table(rows, written)
    content = bytearray(written.getvalue())
    content[20:2000] = bytes(1980)  # the footer is whole
    with pytest.raises(ValueError, match=r"log\.parquet is damaged \(.+\)$"):
        build({"log.parquet": bytes(content)}, "log.parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("item,title\na,A\nb,B\na,C\n", "items.csv line 4 repeats item a: 'a,C'"),
        ("item,title\na,A\n,B\n", "items.csv line 3 has no item"),
        ("item,title\nx,A\ny,B\n", "describes no item of the log: it has items such as 'x', the log 'a'"),
        ("name,plot\na,A\n", "cannot tell which column is the item"),
    ],
)
def test_item_file_refusals(build, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build({"log.csv": LOG, "items.csv": content}, "log.csv", items="items.csv")
