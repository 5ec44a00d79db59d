"""Files and directories appear whole or not at all."""

import resource
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from genrec.data.files import atomic_directory, atomic_file, locked, read_json


def test_file_appears_when_the_block_ends_well(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_file_is_untouched_when_the_block_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def save_tensor(path):
    save_file({"x": np.zeros(2000)}, path)


@pytest.mark.parametrize("write", [lambda path: path.write_bytes(bytes(5000)), save_tensor], ids=["bytes", "tensor"])
def test_what_does_not_fit_is_named(tmp_path, write):
    """By the name that it was to have."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        for whole in (atomic_file, atomic_directory):
            expected = pytest.raises(OSError, match=r"/wanted could not be written \(.*File too large")
            with expected as raised, whole(tmp_path / "wanted") as path:
                write(path / "file" if path.is_dir() else path)
            assert "Errno" not in str(raised.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_directory_replaces_only_on_request(tmp_path):
    path = tmp_path / "out"
    path.mkdir()  # an empty directory is no obstacle
    with atomic_directory(path) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(FileExistsError, match="already exists"), atomic_directory(path):
        pass
    with atomic_directory(path, overwrite=True) as temporary:
        (temporary / "b").write_text("2")
    assert [file.name for file in path.iterdir()] == ["b"]
    with pytest.raises(FileExistsError, match="is a file"), atomic_directory(path / "b", overwrite=True):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_directory_behind_a_link_and_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link") as temporary:
        (temporary / "a").write_text("1")
    assert (tmp_path / "real" / "a").read_text() == "1"
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with atomic_directory(Path()) as temporary:
        (temporary / "b").write_text("2")
    assert (tmp_path / "here" / "b").read_text() == "2"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["here", "link", "real"]


def test_overwriting_never_deletes_an_input(tmp_path):
    log = tmp_path / "out" / "logs" / "log.csv"
    log.parent.mkdir(parents=True)
    log.write_text("old")
    for out in (tmp_path / "out", log.parent, tmp_path):
        with (
            pytest.raises(FileExistsError, match=r"holds the input .*log\.csv"),
            atomic_directory(out, overwrite=True, inputs=[log]),
        ):
            pass
    assert log.read_text() == "old"


def test_what_is_replaced_stays_until_the_block_ends_well(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "a").write_text("old")

    def fail():
        with atomic_directory(path, overwrite=True):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_directory_is_held_by_one_run(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(BlockingIOError, match="in use by another run"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):  # and free afterwards
        pass


def test_json_that_cannot_be_read_is_named_with_its_writer(tmp_path):
    path = tmp_path / "facts.json"
    with pytest.raises(FileNotFoundError, match=r"facts\.json does not exist; expected the output of genrec train"):
        read_json(path, "genrec train")
    for content, words in ((b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[1]", "holds a list; expected a JSON")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"facts\.json {words}"):
            read_json(path, "genrec train")
    path.write_text('{"title": "ü"}', encoding="utf-8")
    assert read_json(path, "genrec train") == {"title": "ü"}
