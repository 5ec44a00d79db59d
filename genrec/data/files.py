"""Files that appear whole or not at all: written under a temporary name beside the target, then renamed. And JSON read
back, with errors that name the file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is synced and takes the name `path`.

    OSError names `path` where it did not fit on its disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".tmp-{path.name}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _naming(path):
            yield temporary
            temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
            _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, overwrite: bool = False, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; when the block ends well it takes the name `path`.

    What stood there before is moved aside first and removed last. Raises FileExistsError if `path` is a file, holds
    something and `overwrite` is False, or holds one of `inputs`, which overwriting would delete; OSError
    names `path` where it did not fit on its disk.
    """
    target = path.resolve()  # what a link names is replaced, not the link; "." has no name of its own
    _refuse_existing(path, overwrite)
    for kept in inputs:
        if kept.resolve().is_relative_to(target):
            raise FileExistsError(f"{path} holds the input {kept}; expected a directory that does not")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name}-", dir=target.parent))
    replaced = temporary.with_name(f"{temporary.name}-replaced")
    try:
        with _naming(path):
            yield temporary
            temporary.chmod(0o755)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
        _refuse_existing(path, overwrite)  # another run may have finished meanwhile
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process, so that two runs never write into it; BlockingIOError if it is taken."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"{directory} is in use by another run; wait for it or choose another directory"
            ) from None
        yield


def read_json(path: Path, writer: str) -> dict[str, Any]:
    """The JSON object in a file; FileNotFoundError or ValueError names the file, or the command that writes it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected the output of {writer}")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What cannot be written says where it was to go: the libraries that write know descriptors and temporary names."""
    try:
        yield
    except SafetensorError as error:  # what is read is checked where it is read
        raise OSError(f"{path} could not be written ({error})") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        failure = OSError(f"{path} could not be written ({os.strerror(error.errno)})")
        failure.errno = error.errno  # for the directory around it, whose name is not temporary
        raise failure from None


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; expected a directory or a path that does not exist")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"{path} already exists; pass --overwrite true to replace it")


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
