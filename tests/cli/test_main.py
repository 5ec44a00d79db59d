"""genrec itself: commands, exit codes, and one sentence for everything that goes wrong."""

import errno
import sys
import types
from dataclasses import dataclass

import pytest

import genrec.cli
from genrec.cli import COMMANDS, main


def test_no_command_prints_usage(capsys):
    assert main([]) == 2
    for flag in ("-h", "--help"):
        assert main([flag]) == 0
    text = capsys.readouterr().out
    assert text.count("usage: genrec COMMAND") == 3
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"genrec {command}" in text
    assert len(text) > 200


def test_help_of_train_explains_nested_keys(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--model.d_model", "width of every token", "--pretrain.optimizer.lr", "learning rate at the end"):
        assert words in text


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("genrec: error: unknown command 'trian'; expected one of features, tokenize, train")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--modle", "x"], ("--modle", "genrec train --help lists the keys")),
        (["train", "--features", "f", "--semantic_ids", "s", "--out", "o", "--model.d_modl", "3"], ("d_modl",)),
        (["train", "--features", "f", "--semantic_ids", "s", "--out", "o", "--seed", "x"], ("seed",)),
        (["train", "--features", "f"], ("semantic_ids",)),
        (["train", "surprise"], ("surprise",)),
        (["evaluate"], ("model",)),
        (["recommend", "--model", "m", "--top_k", "many"], ("top_k",)),
        (["evaluate", "--config", "missing.yaml"], ("missing.yaml",)),
        (["evaluate", "--config", "list.yaml"], ("list.yaml",)),
        (["evaluate", "--config", "broken.yaml"], ("broken.yaml",)),
        (["evaluate", "--config", "unknown.yaml"], ("modle",)),
        (["evaluate", "--config", "."], ()),
        (["train", "--config", "nested.yaml"], ("d_modl",)),
        (["evaluate", "--model", "nowhere"], ("nowhere", "expected the output of genrec train")),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(argv, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "broken.yaml").write_text("model: [unclosed\n: :\n")
    (tmp_path / "unknown.yaml").write_text("modle: x\n")
    (tmp_path / "nested.yaml").write_text("features: f\nsemantic_ids: s\nout: o\nmodel: {d_modl: 8}\n")
    refused(argv, 2, *words)


@dataclass
class Config:
    """Of a command that only raises."""

    word: str = "x"
    """anything"""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a\n  value"), 2),
        (TypeError("a value"), 2),
        (FileNotFoundError("a value"), 2),
        (FileExistsError("a value"), 2),
        (IsADirectoryError("a value"), 2),
        (PermissionError("a value"), 3),
        (BlockingIOError("a value"), 3),
        (OSError(errno.ENOSPC, "a value"), 3),
        (RuntimeError("a value"), 1),
        (KeyError("a value"), 1),
        (AssertionError("a value"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code):
    def run(config):
        raise error

    module = types.ModuleType("genrec.cli.fail")
    module.Config, module.run = Config, run
    monkeypatch.setitem(sys.modules, "genrec.cli.fail", module)
    monkeypatch.setitem(genrec.cli.COMMANDS, "fail", "raises")
    monkeypatch.delenv("GENREC_DEBUG", raising=False)
    assert main(["fail"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("genrec fail: error: ")
    assert captured.err.count("\n") == 1
    assert ("interrupted" if code == 130 else "a value") in captured.err
    if code == 1:
        assert f"unexpected {type(error).__name__}" in captured.err


def test_a_traceback_on_request(monkeypatch, capsys):
    monkeypatch.setenv("GENREC_DEBUG", "1")
    assert main(["evaluate", "--model", "nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_later_arguments_win(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("model: from_file\n")
    assert main(["evaluate", "--config", "a.yaml"]) == 2
    assert "from_file" in capsys.readouterr().err
    assert main(["evaluate", "--config", "a.yaml", "--model", "from_argument"]) == 2
    assert "from_argument" in capsys.readouterr().err
