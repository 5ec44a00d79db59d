"""The load test's arguments and arithmetic; its requests are in test_server.py."""

import re

import pytest

from genrec.serving.loadtest import Result, random_histories, read_histories


def test_summary():
    result = Result(seconds=2.0, latencies=[i / 1000 for i in range(1, 101)])
    result.errors["no"] += 3
    summary = result.summary()
    assert (summary["requests"], summary["errors"], summary["throughput"]) == (103, 3, 50.0)
    assert (summary["p50_ms"], summary["p95_ms"], summary["p99_ms"]) == (50.5, 95.05, 99.01)
    assert (summary["mean_ms"], summary["first_error"]) == (50.5, "no")


def test_random_histories():
    histories = random_histories(["a", "b"], 3, count=50)
    assert {len(history) for history in histories} == {1, 2, 3}
    assert {item for history in histories for item in history} == {"a", "b"}
    assert histories == random_histories(["a", "b"], 3, count=50)


@pytest.mark.parametrize("line", ["", "{}", "[]", "[1]", "nonsense", '"a"'])
def test_histories_that_are_none(tmp_path, line):
    path = tmp_path / "users.jsonl"
    path.write_text(f'["a"]\n{line}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path} line 2 is {line!r}; expected a JSON array of item ids")):
        read_histories(path)


def test_histories_of_a_file(tmp_path):
    path = tmp_path / "users.jsonl"
    path.write_text('["a", "ü"]\n["b"]\n', encoding="utf-8")
    assert read_histories(path) == [["a", "ü"], ["b"]]
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_histories(path)
    with pytest.raises(FileNotFoundError, match="one JSON array of item ids a line"):
        read_histories(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, "expected either --repository or --users"),
        (["--users", "u", "--repository", "r"], 2, "and not both"),
        (["--users", "u", "--clients", "0"], 2, "clients is 0"),
        (["--users", "u", "--seconds", "0"], 2, "seconds 0"),
        (["--users", "u", "--protocol", "udp"], 2, "udp"),
    ],
)
def test_arguments(main, capsys, argv, code, words):
    assert main(["loadtest", *argv]) == code
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_nothing_answers(main, capsys, tmp_path, free_ports, protocol):
    pytest.importorskip("tritonclient")
    users = tmp_path / "users.jsonl"
    users.write_text('["a"]\n')
    url = f"127.0.0.1:{free_ports().http}"
    assert main(["loadtest", "--users", str(users), "--url", url, "--protocol", protocol]) == 3
    assert f"nothing answers at {url}" in capsys.readouterr().err.splitlines()[-1]
