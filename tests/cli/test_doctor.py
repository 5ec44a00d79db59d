import pytest
import torch

from genrec import kernels
from genrec.cli import doctor, main
from genrec.kernels.library import OPERATORS


def test_it_names_versions_and_operators(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in (torch.__version__, "duckdb", "python", "GPU", *OPERATORS):
        assert name in text


def test_it_says_why_kernels_are_missing(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "NATIVE_ERROR", "the compiled kernels were not built")
    assert main(["doctor"]) == 0
    assert "were not built" in " ".join(capsys.readouterr().out.split())


def test_every_operator_agrees_with_float64(capsys):
    assert main(["doctor", "--check", "true"]) == 0
    assert "disagrees" not in capsys.readouterr().out
    assert {name for name, _ in doctor.error_ratios("cpu")} == set(OPERATORS)


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_wrong_operator_is_an_error(capsys, monkeypatch, wrong):
    right = kernels.relu_attention
    monkeypatch.setattr(kernels, "relu_attention", lambda *a, **k: right(*a, **k) * wrong)
    assert main(["doctor", "--check", "true"]) == 2
    captured = capsys.readouterr()
    assert "disagrees" in captured.out
    assert captured.err.startswith("genrec doctor: error: error above 2 times")
    assert "relu_attention on cpu" in captured.err
