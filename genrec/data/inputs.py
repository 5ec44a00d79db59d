"""Which files an input is made of: one file, several, a glob, or a directory partitioned as Hive and Spark do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path
from urllib.parse import unquote

COMPRESSIONS = (".gz", ".zst")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class InputFile:
    """A file, how messages call it, and the columns that its folders add."""

    path: Path
    name: str  # the file's name, or its path below the directory that was given
    partition: dict[str, str] = field(default_factory=dict)  # column → value, "" for Hive's null

    @property
    def plain_name(self) -> str:
        """The file's name without the ending of its compression, in lower case."""
        name = self.path.name.lower()
        return next((name.removesuffix(ending) for ending in COMPRESSIONS if name.endswith(ending)), name)


def find_files(inputs: Path | Sequence[Path]) -> list[InputFile]:
    """The files behind one path or several, in the order given; those of a directory or a glob in the order of their
    paths, without names that start with `_` or `.`.

    Raises FileNotFoundError for a path, a glob or a directory behind which no file is, ValueError for no path at all.
    """
    paths = [inputs] if isinstance(inputs, Path) else list(inputs)
    if not paths:
        raise ValueError("the list of input files is empty; expected at least one")
    return [file for path in paths for file in _files_behind(path)]


def _files_behind(path: Path) -> list[InputFile]:
    if path.is_file():
        return [InputFile(path, path.name)]
    if path.is_dir():
        root, found = path, path.rglob("*")
    elif has_magic(str(path)):
        fixed = next(i for i, part in enumerate(path.parts) if has_magic(part))
        root = Path(*path.parts[:fixed])
        found = root.glob(str(Path(*path.parts[fixed:])))
    else:
        raise FileNotFoundError(f"{path} does not exist")
    files = sorted(file for file in found if file.is_file() and not _hidden(file.relative_to(root)))
    if not files:
        raise FileNotFoundError(f"{path} {'holds no files' if path.is_dir() else 'matches no file'}")
    return [InputFile(file, file.relative_to(root).as_posix(), _partition(file.relative_to(root))) for file in files]


def _hidden(path: Path) -> bool:
    """What Hadoop leaves beside its data: _SUCCESS, .part-0.parquet.crc, _temporary/."""
    return any(part.startswith(("_", ".")) for part in path.parts)


def _partition(path: Path) -> dict[str, str]:
    """The columns in folders such as day=2024-01-01/hour=7."""
    pairs = [folder.split("=", 1) for folder in path.parts[:-1] if "=" in folder]
    return {unquote(column): "" if value == _HIVE_NULL else unquote(value) for column, value in pairs}
