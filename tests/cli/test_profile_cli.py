"""genrec profile as a user types it; Nsight is played by a script that starts what it is told to."""

import csv
import gzip
import json
import os
import stat

import pytest

from genrec.cli import main

SHORT = ["--steps", "2", "--warmup", "1", "--tool", "torch", "--threads", "1"]


def table(path):
    with open(path, encoding="utf-8") as file:
        return {row["range"]: row for row in csv.DictReader(file)}


def traced(path):
    """Names of the trace's ranges of the user."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if event.get("cat") == "user_annotation"}


def train(trained, out, *more):
    small = ["--model.d_model", "16", "--model.d_ffn", "24", "--model.d_expert", "12", "--model.max_events", "10"]
    inputs = ["--features", str(trained / "features"), "--semantic_ids", str(trained / "tokenizer"), "--out", str(out)]
    return ["profile", "train", *inputs, *small, "--device", "cpu", *more]


@pytest.mark.parametrize("stage", ["pretrain", "align"])
def test_train(trained, tmp_path, capsys, stage):
    assert main([*train(trained, tmp_path), "--stage", stage, *SHORT]) == 0
    found = table(tmp_path / "train.ranges.csv")
    assert [found[name]["calls"] for name in ("step", "forward", "backward", "optimizer")] == ["2"] * 4
    assert {"item loss", "relu_attention_varlen backward", "moe_experts"} <= set(found)
    assert ("beam search" in found) == (stage == "align")
    assert {"window", "step", "encoder", "moe_experts"} <= traced(tmp_path / "train.trace.json.gz")
    out = capsys.readouterr().out
    assert "train: " in out
    assert "the same by name" in out
    assert str(tmp_path / "train.ranges.csv") in out


def test_generate(trained, tmp_path):
    arguments = ["--model", str(trained / "model"), "--out", str(tmp_path), "--users", "3", "--beams", "4"]
    assert main(["profile", "generate", *arguments, *SHORT]) == 0
    found = table(tmp_path / "generate.ranges.csv")
    assert found["request"]["shapes"] == "users=3 beams=4 top_k=10"
    assert found["decoder"]["calls"] == "6"


@pytest.mark.parametrize(
    "name", ["relu_attention", "relu_attention_varlen", "group_layer_norm", "moe_route", "moe_experts", "rq_nearest"]
)
def test_op(tmp_path, name):
    sizes = ["--batch", "2", "--length", "5", "--rows", "9", "--dim", "8", "--codebook_sizes", "[4,6]"]
    assert main(["profile", "op", "--name", name, "--out", str(tmp_path), "--device", "cpu", *sizes, *SHORT]) == 0
    found = table(tmp_path / "op.ranges.csv")
    assert set(found) == ({name} if name == "rq_nearest" else {name, f"{name} backward"})
    assert found[name]["calls"] == "2"


@pytest.fixture
def nsight(tmp_path, monkeypatch):
    """nsight(tool, then) puts a script of that name on PATH: it writes its arguments down, runs the program behind
    them, and then does what it is told."""

    def install(tool, then):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        script = folder / tool
        script.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n'
            'while [ "$1" != "--output" ] && [ "$1" != "--export" ]; do shift; done\n'
            f'report=$2; shift 2; "$@" || exit 9\n{then}\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    install.arguments = lambda: (tmp_path / "arguments").read_text().splitlines()
    return install


def test_with_nsight_systems_the_report_is_of_the_window(trained, tmp_path, nsight, capfd):
    nsight("nsys", 'echo report > "$report"')
    assert main([*train(trained, tmp_path / "out"), "--steps", "1", "--warmup", "0", "--threads", "1"]) == 0
    arguments = nsight.arguments()
    assert {"--capture-range=nvtx", "--nvtx-capture=window@genrec", "--capture-range-end=stop"} <= set(arguments)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.nsys-rep", "train.ranges.csv"]
    assert (tmp_path / "out" / "train.nsys-rep").read_text() == "report\n"
    assert table(tmp_path / "out" / "train.ranges.csv")["step"]["calls"] == "1"
    assert "the same by name" in capfd.readouterr().out, "the child prints the table"


def test_an_operator_goes_to_nsight_compute_first(tmp_path, nsight):
    nsight("nsys", 'echo wrong > "$report"')
    nsight("ncu", 'echo report > "$report"')
    sizes = ["--name", "moe_route", "--rows", "4", "--steps", "1", "--threads", "1", "--device", "cpu"]
    assert main(["profile", "op", "--out", str(tmp_path / "out"), *sizes]) == 0
    assert (tmp_path / "out" / "op.ncu-rep").read_text() == "report\n"
    assert "genrec@window/" in nsight.arguments()


@pytest.mark.parametrize("then", ["exit 3", "true"], ids=["fails", "writes nothing"])
def test_a_failing_profiler_is_one_sentence(tmp_path, nsight, refused, then):
    nsight("ncu", then)
    sizes = ["--name", "moe_route", "--rows", "4", "--steps", "1", "--threads", "1", "--device", "cpu"]
    refused(["profile", "op", "--out", str(tmp_path / "out"), *sizes], 3, "ncu ended with exit code", "no report")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["op.ranges.csv"]


def test_refusals(trained, tmp_path, refused, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    op = ["profile", "op", "--out", str(tmp_path / "out")]
    refused([*op, "--steps", "0"], 2, "steps is 0")
    refused([*op, "--tool", "nsys"], 2, "tool is nsys, which is not on PATH")
    refused([*op, "--name", "softmax"], 2, "softmax")
    refused(["profile", "everything"], 2, "unknown kind 'everything'; expected one of train, generate, op")
    users = ["--model", str(trained / "model"), "--out", str(tmp_path), "--users", "1000"]
    refused(["profile", "generate", *users], 2, "users is 1000; expected 1 to")
    for arguments, code in ([], 2), (["--help"], 0):
        with pytest.raises(SystemExit) as stop:
            main(["profile", *arguments])
        assert stop.value.code == code
        assert "genrec profile {train,generate,op} --help" in capsys.readouterr().out
