"""genrec features as a user types it."""

import json

import pytest

from genrec.cli import main

LOG = "user,item,rating,time\n" + "".join(f"u{u},{item},4,{t}\n" for u in range(3) for t, item in enumerate("abcd"))


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.csv").write_text(LOG)
    return tmp_path


def test_table_and_output(log, capsys):
    assert main(["features", "--events", "log.csv", "--out", "out", "--text_dim", "2", "--cooccurrence_dim", "2"]) == 0
    output = capsys.readouterr()
    assert "users" in output.out
    assert "12" in output.out
    assert "features: writing sequences" in output.err
    names = sorted(path.relative_to(log / "out").as_posix() for path in (log / "out").rglob("*") if path.is_file())
    parts = ["sequences/part-00000-of-00001.parquet"]
    assert names == ["items.parquet", *parts, "split.json", "summary.json", "vocabulary.json"]


def test_configuration_file_and_overrides(log):
    (log / "f.yaml").write_text("events: log.csv\nout: out\nmin_events: 5\ncontext: [rating]\n")
    assert main(["features", "--config", "f.yaml", "--min_events", "4"]) == 0
    settings = json.loads((log / "out" / "summary.json").read_text())["config"]
    assert (settings["min_events"], settings["context"]) == (4, ["rating"])


def test_several_files_and_a_glob(log):
    """A list and a quoted glob, in the same order, are the same log."""
    first, rest = LOG[: LOG.index("u1")], "user,item,rating,time\n" + LOG[LOG.index("u1") :]
    (log / "a.csv").write_text(first)
    (log / "b.csv").write_text(rest)
    for name, events in (("list", "[a.csv, b.csv]"), ("glob", "[ab].csv"), ("one", "log.csv")):
        assert main(["features", "--events", events, "--out", name, "--text_dim", "0"]) == 0
    contents = {name: (log / name / "items.parquet").read_bytes() for name in ("list", "glob", "one")}
    assert len(set(contents.values())) == 1
    assert json.loads((log / "list" / "summary.json").read_text())["config"]["events"] == ["a.csv", "b.csv"]


def test_skipped_lines_are_reported(log, capsys):
    (log / "log.csv").write_text(LOG + "broken\n")
    assert main(["features", "--events", "log.csv", "--out", "out", "--max_malformed", "1"]) == 0
    assert "skipped log.csv line 14 has 1 columns, expected 4: 'broken'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--events", "none.csv", "--out", "out"], "none.csv does not exist"),
        (["--out", "out"], "events"),
        (["--events", "log.csv", "--out", "out", "--min_event", "3"], "--min_event"),
        (["--events", "log.csv", "--out", "out", "--min_events", "few"], "min_events"),
        (["--events", "log.csv", "--out", "out", "--window", "0"], "window is 0; expected at least 1"),
        (["--events", "log.csv", "--out", "out", "--user", "who"], "no column 'who' for user"),
        (["--events", "log.csv", "--out", "log.csv"], "log.csv is a file"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(log, capsys, arguments, message):
    assert main(["features", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("genrec features: error: ")
    assert message in last


def test_too_little_memory_is_the_machines_refusal(log, capsys):
    assert main(["features", "--events", "log.csv", "--out", "out", "--memory_limit", "1MB"]) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "genrec features: error: DuckDB needs more memory than memory_limit allows, 1MB; raise it"


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as error:
        main(["features", "--help"])
    assert error.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Drop users with fewer events." in text
    assert "--config" in text
