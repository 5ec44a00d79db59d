"""The physical side of text files: compression, encoding, line ends, line numbers, headers, and lines that cannot be
used. Blocks of bytes become Arrow strings without a copy; Python looks at single lines only where a quote is left open.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

LINE_SCHEMA = pa.schema([("line", pa.int64()), ("text", pa.string())])
_MOST_LINES_PER_RECORD = 1000  # a quote left open ends here instead of swallowing the file
_QUOTED_EXAMPLES = 5
_BLANK = b" \r\n"


@dataclass
class Malformed:
    """Records that were skipped: how many, and the first few in words. More than `limit` raise ValueError."""

    limit: int
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, count: int, examples: list[str]) -> None:
        """Count records, each example saying where and what; refuse them past the limit."""
        self.count += count
        self.examples = (self.examples + examples)[:_QUOTED_EXAMPLES]
        if self.count > self.limit:
            lines = "line" if self.count == 1 else "lines"
            found = f"{self.count} malformed {lines}, more than max_malformed {self.limit} allows"
            raise ValueError(f"{found}: {'; '.join(self.examples)}")


def read_lines(
    path: Path, quoted_by: str | None = None, skip: int = 0, block_bytes: int = 1 << 22
) -> Iterator[pa.RecordBatch]:
    """The non-blank records of a UTF-8 file (.gz and .zst are unpacked) after its first `skip` as (line number from 1,
    text with its line end), in batches of about `block_bytes`.

    A record is a line; in a file delimited by `quoted_by` it runs on while a quoted field is open.
    Raises ValueError while reading if the file is not UTF-8 text, or not compressed as its name says.
    """
    open_quote = None if quoted_by is None else _open_quote(quoted_by)
    buffer, line = b"", 1
    for block in _blocks(path, block_bytes):
        buffer, last = buffer + block, not block
        ends = np.flatnonzero(np.frombuffer(buffer, np.uint8) == ord("\n")) + 1
        if last and buffer and not buffer.endswith(b"\n"):
            ends = np.append(ends, len(buffer))
        starts = np.concatenate([[0], ends])[:-1]
        first, lines = _first_lines(buffer, starts, ends, open_quote, last)
        if lines == 0:
            continue
        batch = _batch(path, buffer, line + first, np.append(starts[first], ends[lines - 1]))
        buffer, line = buffer[ends[lines - 1] :], line + lines
        if len(batch):
            skipped = min(skip, len(batch))
            skip -= skipped
            yield batch.slice(skipped)


def first_record(path: Path, quoted_by: str | None = None) -> str:
    """The first non-blank record without its line end; ValueError if there is none."""
    for batch in read_lines(path, quoted_by, block_bytes=1 << 16):
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


def read_bytes(path: Path) -> bytes:
    """The whole file, unpacked; ValueError as `read_lines`."""
    return b"".join(_blocks(path, 1 << 24))


def _blocks(path: Path, block_bytes: int) -> Iterator[bytes]:
    """The file's bytes, and an empty block at the end."""
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            block = stream.read(block_bytes)
            yield block.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is not part of the first column's name
            while block:
                block = stream.read(block_bytes)
                yield block
    except OSError as error:
        if error.errno is not None:  # the disk's fault, not the file's
            raise
        raise ValueError(f"{path} cannot be unpacked; expected {path.suffix[1:]} data, whole ({error})") from None


def _first_lines(
    buffer: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64], open_quote: re.Pattern[bytes] | None, last: bool
) -> tuple[NDArray[np.int64], int]:
    """Numbers of the lines, counted from 0, that start a record, and how many lines belong to whole records."""
    lines = len(ends)
    if open_quote is None or b'"' not in buffer:
        return np.arange(lines), lines
    quotes = np.flatnonzero(np.frombuffer(buffer, np.uint8) == ord('"'))
    odd = np.flatnonzero((np.searchsorted(quotes, ends) - np.searchsorted(quotes, starts)) % 2)
    starts_record = np.ones(lines, np.bool_)
    k = 0
    while k < len(odd):
        opening, closing = odd[k], odd[k + 1] if k + 1 < len(odd) else None
        k += 1
        if not open_quote.match(buffer, starts[opening], ends[opening]):
            continue
        if closing is None:
            if not last and lines - opening < _MOST_LINES_PER_RECORD:  # the next block may close it
                lines = int(opening)
        elif closing - opening < _MOST_LINES_PER_RECORD:
            starts_record[opening + 1 : closing + 1] = False
            k += 1
    return np.flatnonzero(starts_record[:lines]), lines


def _open_quote(delimiter: str) -> re.Pattern[bytes]:
    """Matches a line of whole fields whose last one opens a quote and does not close it."""
    field_ = rf'(?:"(?:[^"]|"")*+"|[^"{delimiter}]*+)[{delimiter}]'
    return re.compile(rf'(?:{field_})*+"(?:[^"]|"")*+\Z'.encode())


def _batch(path: Path, buffer: bytes, numbers: NDArray[np.int64], offsets: NDArray[np.int64]) -> pa.RecordBatch:
    """Records that lie end to end in `buffer`, without blank ones."""
    if (nul := buffer.find(b"\0", 0, offsets[-1])) >= 0:
        line = numbers[np.searchsorted(offsets, nul, side="right") - 1]
        raise ValueError(f"{path} line {line} holds a NUL byte; expected a UTF-8 text file")
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(buffer)]
    texts = pa.Array.from_buffers(pa.binary(), len(numbers), buffers)
    try:
        texts = texts.cast(pa.string())
    except pa.ArrowInvalid:
        line = _first_undecodable(numbers, texts.to_pylist())
        raise ValueError(f"{path} line {line} is not UTF-8; convert the file") from None
    batch = pa.record_batch([pa.array(numbers, pa.int64()), texts], schema=LINE_SCHEMA)
    begins = np.frombuffer(buffer, np.uint8)[offsets[:-1]]
    suspects = np.flatnonzero(np.isin(begins, np.frombuffer(_BLANK, np.uint8)))
    blank = [i for i in suspects if not buffer[offsets[i] : offsets[i + 1]].strip(_BLANK)]
    if blank:
        batch = batch.take(np.delete(np.arange(len(numbers)), blank))
    return batch


def _first_undecodable(numbers: NDArray[np.int64], texts: list[bytes]) -> int:
    for number, text in zip(numbers, texts, strict=True):
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            return int(number)
    return int(numbers[0])
