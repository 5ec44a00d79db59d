"""genrec export: files that servers load, and one sentence for what is wrong."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

from genrec.cli import main

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "onnx"
    assert main(["export", str(trained), "--to", "onnx", "--out", str(out), "--beams", "12", "--top_k", "5"]) == 0
    return out


def test_onnx(exported, capsys):
    assert sorted(path.name for path in exported.iterdir()) == ["items.json", "model.onnx", "recommender.json"]
    about = json.loads((exported / "recommender.json").read_text())
    assert (about["beams"], about["top_k"], about["exclude_seen"]) == (12, 5, True)
    assert about["outputs"][0] == {"name": "item_ids", "dtype": "int64", "shape": ["batch", 5]}
    assert about["agreement"]["same_items"] == 1.0


def test_what_is_there_is_kept(exported, trained, refused):
    before = (exported / "model.onnx").read_bytes()
    refused(["export", str(trained), "--to", "onnx", "--out", str(exported)], 2, "already exists", "--overwrite true")
    assert (exported / "model.onnx").read_bytes() == before


def test_triton(trained, tmp_path, capsys):
    out = tmp_path / "repository"
    assert main(["export", str(trained), "--to", "triton", "--out", str(out), "--max_batch_size", "16"]) == 0
    assert f"repository → {out}" in capsys.readouterr().out
    assert "max_batch_size: 16" in (out / "recommend_graph" / "config.pbtxt").read_text()
    assert (out / "recommend_graph" / "1" / "model.onnx").is_file()


def test_tensorrt_without_tensorrt_prints_the_command(trained, tmp_path, capsys, monkeypatch):
    headers = importlib.util.find_spec("kernel_lens")
    if shutil.which("g++") is None or (headers is None and "TENSORRT_INCLUDE_DIR" not in os.environ):
        pytest.skip("no g++ or no headers of TensorRT here")
    if headers is not None:
        monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(Path(headers.origin).parent / "include" / "tensorrt"))
    monkeypatch.setattr("genrec.export.tensorrt.installed", lambda: None)
    monkeypatch.setattr("genrec.export.kernel_images.ALL", ())  # the PTX alone, for time's sake
    out = tmp_path / "engine"
    assert main(["export", str(trained), "--to", "tensorrt", "--out", str(out)]) == 0
    assert (out / "libgenrec_trt.so").stat().st_size > 100_000
    printed = capsys.readouterr().out
    assert f"--dynamicPlugins={out / 'libgenrec_trt.so'}" in printed
    assert "--maxShapes=history:64x1024" in printed


def test_bad_input(trained, tmp_path, refused):
    out = ["--out", str(tmp_path / "out")]
    refused(["export", str(tmp_path), "--to", "onnx", *out], 2, "holds no model")
    refused(["export", str(trained), "--to", "tflite", *out], 2, "tflite")
    refused(["export", str(trained), "--to", "onnx", *out, "--beams", "0"], 2, "beams is 0; expected 1 or more")
    refused(["export", str(trained), "--to", "onnx", *out, "--mode", "best"], 2, "best")
    refused(["export", str(trained), "--to", "triton", *out, "--max_length", "0"], 2, "max_length is 0")
    refused(["export", str(trained), "--to", "triton", *out, "--engine", str(tmp_path)], 2, "model.onnx")
    assert not (tmp_path / "out").exists()


def test_missing_compilers_are_said_first(trained, tmp_path, refused, monkeypatch):
    monkeypatch.setenv("PATH", "")
    refused(["export", str(trained), "--to", "tensorrt", "--out", str(tmp_path / "engine")], 2, "g++")
    assert not (tmp_path / "engine").exists()
