"""Logs of several files: lists, globs, partitioned directories, compressed text, Parquet."""

import gzip
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrec.data.catalogue import load_catalogue
from genrec.data.config import FeaturesConfig
from genrec.data.context import ContextIds
from genrec.data.inputs import find_files
from genrec.data.lines import read_lines
from genrec.data.vocabulary import load_vocabulary

HEADER = "user,item,rating,time\n"
PARTS = {"a.csv": HEADER + "u1,b,4.0,30\nu1,a,1.5,10\n", "b.csv": HEADER + "u2,a,3.0,5\nu1,c,5.0,10\nu2,b,2.0,7\n"}
EXPECTED = {
    "u1": [("a", 1.5, 10), ("c", 5.0, 10), ("b", 4.0, 30)],  # by time, ties as in the files
    "u2": [("a", 3.0, 5), ("b", 2.0, 7)],
}


@pytest.fixture
def write(tmp_path):
    """write({"day=1/a.csv": "…"}) puts files below tmp_path."""

    def run(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return run


def test_list_glob_and_directory(write, build, read_back, tmp_path):
    write({f"logs/{name}": content for name, content in PARTS.items()} | {"logs/_SUCCESS": "", "logs/.b.csv.crc": "x"})
    events = {"list": [tmp_path / "logs/a.csv", tmp_path / "logs/b.csv"], "glob": "logs/?.csv", "directory": "logs"}
    for name, value in events.items():
        directory, summary = build({}, value, out=name)
        assert read_back(directory) == EXPECTED
    assert summary["config"]["events"] == "logs"
    assert list(read_back(build({}, "logs/*.csv", out="again")[0])) == ["u1", "u2"]
    reverse, summary = build({}, events["list"][::-1], out="reverse")
    assert list(read_back(reverse)) == ["u2", "u1"]  # the order of the list is that of the events
    assert [event[0] for event in read_back(reverse)["u1"]] == ["c", "a", "b"]
    assert summary["config"]["events"] == ["b.csv", "a.csv"]


@pytest.mark.parametrize("kind", ["csv.gz", "csv.zst", "jsonl.gz", "parquet", "tsv"])
def test_kinds(write, build, read_back, kind):
    rows = [line.split(",") for name in PARTS for line in PARTS[name].splitlines()[1:]]
    text = PARTS["a.csv"] + PARTS["b.csv"].removeprefix(HEADER)
    if kind.startswith("jsonl"):
        text = "".join(f'{{"user":"{u}","item":"{i}","rating":{r},"time":{t}}}\n' for u, i, r, t in rows)
    content = text.replace(",", "\t") if kind == "tsv" else text
    content = gzip.compress(content.encode()) if kind.endswith("gz") else content
    content = pa.compress(content.encode(), "zstd", asbytes=True) if kind.endswith("zst") else content
    folder = write({f"log.{kind}": content})
    if kind == "parquet":
        users, items, ratings, times = zip(*rows, strict=True)
        columns = {"user": users, "item": items, "rating": map(float, ratings), "time": map(int, times)}
        pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), folder / "log.parquet")
    assert read_back(build({}, f"log.{kind}")[0]) == EXPECTED


def test_folders_become_columns(write, build, read_back):
    log = "user,item,time\nu,a,1\nu,b,2\n"
    files = {
        "log/day=2024-01-02/tv=a%2Fb/part-0.csv": log.replace("u,", "v,"),
        "log/day=2024-01-01/tv=x/part-0.csv": log,
        "log/day=2024-01-01/tv=__HIVE_DEFAULT_PARTITION__/part-0.csv": log,
    }
    write(files)
    for events in ("log", "log/*/*/*.csv"):
        directory, _ = build({}, events, context=["day", "tv"], overwrite=True)
        assert list(read_back(directory)) == ["u", "v"]
        context = {run.column: run.values for run in load_vocabulary(directory).context}
        assert context == {"day": ("2024-01-01", "2024-01-02"), "tv": ("a/b", "x")}
    write({"log/day=2024-01-01/tv=x/part-0.csv": "user,item,tv\nu,a,1\n"})
    with pytest.raises(ValueError, match=r"tv=x/part-0\.csv: column 'tv' is in the file and in the name of its folder"):
        build({}, "log", overwrite=True)


def test_parquet_types(build, read_back, tmp_path):
    """Numbers, dates and timestamps are what their text would be; a file may have columns that are not read."""
    table = pa.table(
        {
            "user": [1, 1, 2, 2],
            "item": pa.array(["x", "y", "x", ""]).dictionary_encode(),
            "rating": pa.array([4.5, None, 3, 1], pa.float64()),
            "time": pa.array([1_700_000_000_500_000, 1_700_000_000_400_000, 7, 8], pa.timestamp("us", "UTC")),
            "list": [[1], [], None, [2]],
            "odd \"name'": [1, 2, 3, 4],
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    directory, summary = build({}, "log.parquet", max_malformed=1, context=["odd \"name'"])
    second = 1_700_000_000
    assert read_back(directory) == {"1": [("y", None, second), ("x", 4.5, second)], "2": [("x", 3.0, 0)]}
    assert summary["malformed_examples"] == ["log.parquet line 4 has no item: '2, 1.0, 8'"]
    assert load_vocabulary(directory).context == (ContextIds("odd \"name'", ("1", "2", "3")),)


def test_errors_name_the_file_and_its_line(write, build):
    write({"log/day=1/part.csv": PARTS["a.csv"], "log/day=2/part.csv": PARTS["b.csv"] + ",x,1,1\nu9,x,bad,1\n"})
    message = (
        "max_malformed 0 allows: day=2/part.csv line 5 has no user: ',x,1,1'; day=2/part.csv line 6 has rating bad"
    )
    with pytest.raises(ValueError, match=re.escape(f"2 malformed lines, more than {message}")):
        build({}, "log")
    write({"log/day=2/part.csv": "user,item,stars,time\nu,a,1,1\n"})
    columns = (
        r"day=2/part\.csv has the columns user, item, stars, time, day; expected those of .*day=1/part\.csv: user,"
    )
    with pytest.raises(ValueError, match=columns):
        build({}, "log")
    write({"log/day=2/part.csv": b"user,item,rating,time\n\xff,a,1,1\n"})
    with pytest.raises(ValueError, match=r"day=2/part\.csv line 2 is not UTF-8"):
        build({}, "log")
    write({"log/a.txt.lzo": "x"})
    with pytest.raises(ValueError, match=r"a\.txt\.lzo has an unknown format; expected a name ending in one of"):
        build({}, "log")


def test_columns_may_come_in_any_order_and_json_may_leave_keys_out(write, build, read_back):
    write({"log/1.csv": "item,user\na,u\n", "log/2.csv": "user,item\nu,b\n"})
    assert read_back(build({}, "log", out="csv")[0]) == {"u": [("a", None, 0), ("b", None, 0)]}
    lines = {"j/1.jsonl": '{"user":1,"item":"a"}\n', "j/2.jsonl": '{"user":1,"item":"b","time":5,"rating":2}\n'}
    write(lines)
    with pytest.raises(ValueError, match=r"1\.jsonl line 1 has time \(empty\)"):
        build({}, "j")
    assert read_back(build({}, "j", time="", out="json")[0]) == {"1": [("a", None, 0), ("b", 2.0, 0)]}


def test_item_files(write, build):
    write({"items/1.csv": "item,title\na,Alpha\n", "items/2.csv": "title,item\nBeta,b\nAgain,a\n"})
    log = {"log.csv": "user,item\nu,a\nu,b\n"}
    with pytest.raises(ValueError, match=r"1 malformed line, .*: 2\.csv line 3 repeats item a: 'Again,a'"):
        build(log, "log.csv", items="items")
    directory, _ = build(log, "log.csv", items="items", max_malformed=1)
    assert sorted(load_catalogue(directory).titles[1:]) == ["Alpha", "Beta"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv.gz", b"user,item\nu,a\n", "log.csv.gz cannot be unpacked; expected gz data, whole"),
        ("log.csv.gz", gzip.compress(b"user,item\n" + b"u,a\n" * 9999, mtime=0)[:-20], "log.csv.gz cannot be unpacked"),
        ("log.csv.zst", b"user,item\nu,a\n", "log.csv.zst cannot be unpacked; expected zst data, whole"),
        ("X.inter.json.gz", b"{}", "X.inter.json.gz cannot be unpacked"),
    ],
)
def test_what_cannot_be_unpacked(build, name, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build({name: content}, name)


def test_no_files():
    with pytest.raises(ValueError, match="the list of input files is empty"):
        find_files([])


def test_output_never_replaces_an_input_of_a_directory(write, build, tmp_path):
    write({"features/day=1/a.csv": PARTS["a.csv"]})
    with pytest.raises(FileExistsError, match=r"holds the input .*day=1/a\.csv"):
        build({}, "features", overwrite=True)
    assert FeaturesConfig([tmp_path / "x.csv", tmp_path / "y.csv"], tmp_path).events_name.endswith("y.csv")


TEXT = 'h,"q"\r\n\n  \nü1,"open\n\nstill, ""x""\nclosed",2\nplain"odd\n"never closed\nlast,line'


@pytest.mark.parametrize("block", [1, 2, 3, 7, 20, 1 << 20])
@pytest.mark.parametrize("quoted_by", [None, ","])
def test_records_do_not_depend_on_the_blocks_they_are_read_in(write, block, quoted_by):
    path = write({"text.csv": TEXT}) / "text.csv"
    found = [
        record
        for batch in read_lines(path, quoted_by, skip=1, block_bytes=block)
        for record in zip(batch["line"].to_pylist(), batch["text"].to_pylist(), strict=True)
    ]
    lines = TEXT.splitlines(keepends=True)
    rest = [(number, lines[number - 1]) for number in (8, 9, 10)]
    if quoted_by is None:
        expected = [(4, lines[3]), (6, lines[5]), (7, lines[6]), *rest]
    else:
        expected = [(4, "".join(lines[3:7])), *rest]
    assert found == expected
