"""The physical side of text files: encoding, line ends, line numbers, headers, and lines that cannot be used."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

LINE_SCHEMA = pa.schema([("line", pa.int64()), ("text", pa.string())])
_MOST_LINES_PER_RECORD = 1000  # a quote left open ends here instead of swallowing the file
_QUOTED_EXAMPLES = 5


@dataclass
class Malformed:
    """Records that were skipped: how many, and the first few in words. More than `limit` raise ValueError."""

    limit: int
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, path: Path, count: int, examples: list[str]) -> None:
        """Count records of `path`, each example saying where and what; refuse them past the limit."""
        self.count += count
        self.examples = (self.examples + [f"{path.name} {example}" for example in examples])[:_QUOTED_EXAMPLES]
        if self.count > self.limit:
            lines = "line" if self.count == 1 else "lines"
            found = f"{self.count} malformed {lines}, more than max_malformed {self.limit} allows"
            raise ValueError(f"{found}: {'; '.join(self.examples)}")


def read_lines(
    path: Path, quoted_by: str | None = None, skip: int = 0, block_bytes: int = 1 << 24
) -> Iterator[pa.RecordBatch]:
    """The non-blank records of a UTF-8 file after its first `skip` as (line number from 1, text with its line end).

    A record is a line; in a file delimited by `quoted_by` it runs on while a quoted field is open.
    Raises ValueError while reading if the file is not UTF-8 text.
    """
    numbers: list[int] = []
    texts: list[bytes] = []
    size = 0
    for number, text in _records(path, quoted_by):
        if not text.strip(b" \r\n"):
            continue
        if skip:
            skip -= 1
            continue
        numbers.append(number)
        texts.append(text)
        size += len(text)
        if size >= block_bytes:
            yield _batch(path, numbers, texts)
            numbers, texts, size = [], [], 0
    if texts:
        yield _batch(path, numbers, texts)


def first_record(path: Path, quoted_by: str | None = None) -> str:
    """The first non-blank record without its line end; ValueError if there is none."""
    for batch in read_lines(path, quoted_by, block_bytes=1):
        return batch["text"][0].as_py().rstrip("\r\n")
    raise ValueError(f"{path} is empty; expected at least one record")


def read_header(path: Path, delimiter: str, quoting: bool) -> list[str]:
    """Column names of a delimited file; ValueError if one is empty or occurs twice."""
    header = first_record(path, delimiter if quoting else None)
    names = next(csv.reader([header], delimiter=delimiter)) if quoting else header.split(delimiter)
    names = [name.strip() for name in names]
    for name in names:
        if not name or names.count(name) > 1:
            problem = f"names column {name!r} twice" if name else "leaves a column without a name"
            raise ValueError(f"{path}: the header {problem}; expected distinct names, not {header[:200]!r}")
    return names


def sniff_delimiter(path: Path) -> str:
    """The most frequent of comma, semicolon, tab and bar in the header."""
    header = first_record(path)
    return max(",;\t|", key=header.count)


def _records(path: Path, quoted_by: str | None) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark is not part of the first column's name
            file.seek(0)
        lines = enumerate(file, 1)
        if quoted_by is None:
            yield from lines
            return
        leaves_quote_open = _open_quote(quoted_by)
        for number, text in lines:
            if text.count(b'"') % 2 and leaves_quote_open.match(text):
                yield from _quoted_record(number, text, lines)
            else:
                yield number, text


def _open_quote(delimiter: str) -> re.Pattern[bytes]:
    """Matches a line of whole fields whose last one opens a quote and does not close it."""
    field_ = rf'(?:"(?:[^"]|"")*+"|[^"{delimiter}]*+)[{delimiter}]'
    return re.compile(rf'(?:{field_})*+"(?:[^"]|"")*+\Z'.encode())


def _quoted_record(number: int, text: bytes, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The record that opens a quote in `text`, up to the line that closes it; line by line if none does."""
    record = [(number, text)]
    for following in lines:
        record.append(following)
        if following[1].count(b'"') % 2:
            yield number, b"".join(line for _, line in record)
            return
        if len(record) == _MOST_LINES_PER_RECORD:
            break
    yield from record


def _batch(path: Path, numbers: list[int], texts: list[bytes]) -> pa.RecordBatch:
    for number, text in zip(numbers, texts, strict=True):
        if b"\0" in text:
            raise ValueError(f"{path} line {number} holds a NUL byte; expected a UTF-8 text file")
    try:
        strings = pa.array(texts, pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        raise ValueError(f"{path} line {_first_undecodable(numbers, texts)} is not UTF-8; convert the file") from None
    return pa.record_batch([pa.array(numbers, pa.int64()), strings], schema=LINE_SCHEMA)


def _first_undecodable(numbers: list[int], texts: list[bytes]) -> int:
    for number, text in zip(numbers, texts, strict=True):
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            return number
    return numbers[0]
