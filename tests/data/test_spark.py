"""Spark gives what DuckDB gives, byte for byte; it reads, writes and fails as well as DuckDB does."""

import csv
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrec.cli import main
from genrec.data.build import build_features
from genrec.data.config import FeaturesConfig

pytest.importorskip("pyspark")
pytest.importorskip("sqlglot")
needs_java = pytest.mark.skipif(not (os.environ.get("JAVA_HOME") or shutil.which("java")), reason="Java is missing")
SETTINGS = {"spark.sql.shuffle.partitions": "2", "spark.default.parallelism": "2"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One session for all tests: starting another takes seconds."""
    from genrec.data.spark_engine import spark_engine

    folder = tmp_path_factory.mktemp("spark")
    settings = SETTINGS | {"spark.sql.warehouse.dir": str(folder), "spark.local.dir": str(folder)}
    with spark_engine(FeaturesConfig(folder, folder, threads=2, spark=settings)) as engine:
        yield engine


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_the_same(tmp_path, events, **settings):
    """Build with both engines; the summary."""
    settings = {"text_dim": 4, "cooccurrence_dim": 4} | settings
    for engine in ("duckdb", "spark"):
        summary = build_features(FeaturesConfig(events, tmp_path / engine, engine=engine, spark=SETTINGS, **settings))
    expected, found = contents(tmp_path / "duckdb"), contents(tmp_path / "spark")
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
    return summary


@needs_java
def test_movielens(engine, movielens, tmp_path):
    """The first users of the shipped log, with titles, in several parts, one of them of a single user."""
    lines = (movielens / "ratings.csv").read_text().splitlines(keepends=True)[:4_000]
    (tmp_path / "ratings.csv").write_text("".join(lines))
    settings = {"items": movielens / "movies.csv", "max_events": 100, "min_count": 2, "include_unseen": True}
    summary = assert_the_same(tmp_path, tmp_path / "ratings.csv", rows_per_file=7, **settings)
    assert summary["users"] > 20
    assert summary["cut_events"] > 500


COLUMNS = ["user", "item", "rating", "time", "did", "device"]


def awkward_rows():
    """Few times, so that ties decide; missing ratings; names that sort differently as bytes and as text."""
    rng = np.random.default_rng(0)
    users = ["u", "U", "ü", "用户", "𝒰", "a b", 'q"t', "last"]
    items = ["b", "B", "é", "e", "物", "𝒾", "", "x,y", "-0", "007", "7"]
    ratings = ["", "-0.0", "0", "1e0", "1.0", "4.5", " 3", "nan", "3d"]
    rows = []
    for _ in range(600):
        user, item = users[rng.integers(len(users)) // (1 + rng.integers(2))], items[rng.integers(len(items))]
        rating, time = ratings[rng.choice(9, p=[0.3] + [0.11] * 6 + [0.02] * 2)], 10**12 + int(rng.integers(8)) * 500
        did, device = ["buy", "view", ""][rng.integers(3)], ["tv", "Telefon", "电视"][rng.integers(3)]
        rows.append([user, item, rating, str(time), did, device])
    return rows


def text_of(rows, delimiter):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows([COLUMNS, *rows])
    return text.getvalue()


@needs_java
@pytest.mark.parametrize(
    "settings",
    [
        {"action": "did", "context": ["device", "day"], "min_count": 3, "window": 3},
        {"time": "", "min_events": 1, "holdout": 0, "format": "tfrecord", "max_pairs": 5},
        {"split": "time", "valid_from": 10**9 + 1, "test_from": 10**9 + 3, "max_events": 3, "min_count": 2},
        {"weight": "rating", "weight_buckets": 3, "session_gap": 1, "hash_buckets": 7, "min_count": 40},
    ],
)
def test_awkward_log(engine, tmp_path, settings):
    """One log in all formats that executors read, malformed lines among them."""
    rows, log = awkward_rows(), tmp_path / "log"
    for folder in ("day=2024-01-01", "day=__HIVE_DEFAULT_PARTITION__"):
        (log / folder).mkdir(parents=True)
    (log / "day=2024-01-01/1.csv").write_text(text_of(rows[:150], ",") + "broken\n,no user,1,1,buy,tv\n")
    (log / "day=2024-01-01/2.tsv").write_text(text_of(rows[150:300], "\t"))
    objects = [json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) for row in rows[300:450]]
    (log / "day=2024-01-01/3.jsonl.gz").write_bytes(gzip.compress("\n".join(objects).encode()))
    columns = dict(zip(COLUMNS, map(list, zip(*rows[450:], strict=True)), strict=True))
    columns["time"] = [int(time) for time in columns["time"]]
    pq.write_table(pa.table(columns), log / "day=__HIVE_DEFAULT_PARTITION__/4.parquet")
    summary = assert_the_same(tmp_path, log, max_malformed=200, rows_per_file=2, **settings)
    assert summary["malformed_lines"] > 40
    assert summary["malformed_examples"][0].startswith("day=2024-01-01/1.csv line ")
    assert summary["users"] >= 7


@needs_java
def test_extended_vocabulary(engine, tmp_path):
    """Items, actions and context values that are known, gone and new."""
    rows = awkward_rows()
    (tmp_path / "old.csv").write_text(text_of([row for row in rows[:200] if row[4] != "buy"], ","))
    (tmp_path / "new.csv").write_text(text_of(rows[200:], ","))
    settings = {"action": "did", "context": ["device"], "min_count": 3, "max_malformed": 600, "cooccurrence_dim": 8}
    build_features(FeaturesConfig(tmp_path / "old.csv", tmp_path / "old", text_dim=0, **settings))
    assert_the_same(tmp_path, tmp_path / "new.csv", extend=tmp_path / "old", **settings)
    written = json.loads((tmp_path / "spark" / "vocabulary.json").read_text())
    assert (written["version"], written["action_names"]) == (2, ["view", "buy"])


@needs_java
def test_a_cluster(tmp_path):
    """A master and two workers, whose executors are processes with a Python of their own: only files are shared."""
    log = tmp_path / "log"
    log.mkdir()
    rows = awkward_rows()
    for number in range(3):
        (log / f"{number}.csv").write_text(text_of(rows[200 * number : 200 * (number + 1)], ","))
    settings = {"max_malformed": "200", "rows_per_file": "2", "text_dim": "0", "cooccurrence_dim": "4", "action": "did"}
    common = [
        "features",
        "--events",
        str(log),
        *(word for key, value in settings.items() for word in (f"--{key}", value)),
    ]
    assert main([*common, "--out", str(tmp_path / "duckdb")]) == 0
    cluster = SETTINGS | {"spark.master": "local-cluster[2,1,1024]", "spark.local.dir": str(tmp_path / "scratch")}
    on_spark = ["--engine", "spark", "--spark", json.dumps(cluster), "--out", str(tmp_path / "spark")]
    environment = os.environ | {"PYSPARK_PYTHON": sys.executable, "SPARK_WORKER_DIR": str(tmp_path / "work")}
    command = [sys.executable, "-m", "genrec", *common, *on_spark]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "WARN" not in done.stderr.split("reading", 1)[1]  # Spark's own log says nothing
    assert contents(tmp_path / "duckdb") == contents(tmp_path / "spark")


@needs_java
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"user,item\nu,\xff\n", "log.csv line 2 is not UTF-8; convert the file"),
        (b"user,item\nu,\n", "1 malformed line, more than max_malformed 0 allows: log.csv line 2 has no item: 'u,'"),
        (b"user,item\n", "log.csv has no usable events; expected at least one record after its header"),
        (b"user,item\nu,a\n", "no user has min_events = 3 events; the longest history has 1"),
    ],
)
def test_refusals_are_those_of_duckdb(engine, tmp_path, capsys, content, message):
    (tmp_path / "log.csv").write_bytes(content)
    arguments = ["features", "--events", str(tmp_path / "log.csv"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--engine", "spark"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("genrec features: error: ")
    assert last.endswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


@needs_java
def test_errors_of_spark_are_one_sentence(engine):
    with pytest.raises(OSError, match=r"^Spark: .*TABLE_OR_VIEW_NOT_FOUND.*nowhere[^\n]*$"):
        engine.fetch("SELECT a FROM nowhere")

    def fail(batches):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match=r"^Spark: OSError: the disk is full$"):
        engine.write_parts("SELECT 0 AS part, 1 AS user, 2 AS n", 1, fail)


@needs_java
def test_data_source_writes_in_parallel(engine, tmp_path):
    tfrecord = pytest.importorskip("tfrecord.reader")
    from pyspark.sql import SparkSession

    from genrec.data.spark_tfrecord import TFRecordDataSource

    session = SparkSession.getActiveSession()
    session.dataSource.register(TFRecordDataSource)
    frame = session.range(0, 100, 1, 3).selectExpr("id", "array(id, id * 300) AS list", "concat('ü', id) AS text")
    target = str(tmp_path / "out")
    frame.write.format("tfrecord").mode("append").save(target)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [re.sub("-[0-9a-f]{8}", "", name) for name in names] == [
        "_SUCCESS", "part-00000.tfrecord", "part-00001.tfrecord", "part-00002.tfrecord",
    ]  # fmt: skip
    kinds = {"id": "int", "list": "int", "text": "byte"}
    found = [record for name in names[1:] for record in tfrecord.tfrecord_loader(f"{target}/{name}", None, kinds)]
    assert [record["list"].tolist() for record in found] == [[i, i * 300] for i in range(100)]
    assert [bytes(record["text"]).decode() for record in found] == [f"ü{i}" for i in range(100)]
    with pytest.raises(Exception, match="tfrecord cannot overwrite"):
        frame.write.format("tfrecord").mode("overwrite").save(target)
    with pytest.raises(Exception, match="'m' has type map<string, int64>; expected integers"):
        frame.selectExpr("map(text, id) AS m").write.format("tfrecord").mode("append").save(str(tmp_path / "bad"))
    assert list((tmp_path / "bad").iterdir()) == []


@pytest.mark.parametrize("missing", ["pyspark", "sqlglot"])
def test_missing_packages(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert_refused(tmp_path, r"^engine spark needs pyspark and sqlglot; pip install 'genrec\[spark\]'$")


def test_missing_java(tmp_path, monkeypatch):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_refused(tmp_path, "^engine spark needs Java 17 or later; install it, or set JAVA_HOME$")


def assert_refused(folder, message):
    (folder / "log.csv").write_text("user,item\nu,a\n")
    with pytest.raises(ValueError, match=message):
        build_features(FeaturesConfig(folder / "log.csv", folder / "out", engine="spark"))
    assert [path.name for path in folder.iterdir()] == ["log.csv"]
