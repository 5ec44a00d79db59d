"""TFRecord files against an independent reader, and against the protocol buffers of hand-written bytes."""

import gzip
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data.sequences import load_sequences
from genrec.data.tfrecord import encode_examples

reader = pytest.importorskip("tfrecord.reader")

KINDS = {"user_id": "byte"} | dict.fromkeys(("token_ids", "type_ids", "positions", "item_ids", "timestamps"), "int")
int64 = st.integers(-(2**63), 2**63 - 1)


def read(path, kinds, **options):
    return list(reader.tfrecord_loader(str(path), None, kinds, **options))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(int64, max_size=20),
            st.lists(st.floats(width=32), max_size=20),
            st.text(st.characters(codec="utf-8"), max_size=200),
            int64,
        ),
        min_size=1,
        max_size=8,
    )
)
def test_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("records") / "a.tfrecord"
    integers, floats, texts, singles = map(list, zip(*rows, strict=True))
    table = pa.table(
        {
            "integers": pa.array(integers, pa.list_(pa.int64())),
            "floats": pa.array(floats, pa.list_(pa.float32())),
            "text": pa.array(texts, pa.string()),
            "single": pa.array(singles, pa.int64()),
        }
    )
    path.write_bytes(encode_examples(table))
    found = read(path, {"integers": "int", "floats": "float", "text": "byte", "single": "int"})
    assert [record["integers"].tolist() for record in found] == integers
    assert [bytes(record["text"]).decode() for record in found] == texts
    assert [record["single"].tolist() for record in found] == [[value] for value in singles]
    for record, values in zip(found, floats, strict=True):
        np.testing.assert_array_equal(record["floats"], np.array(values, np.float32))


def crc32c(data):
    """Bit by bit, from the polynomial of Castagnoli."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def test_bytes_of_one_record():
    """Example { features { feature { key: "n" value { int64_list { value: [1, 300] } } } } }, framed."""
    example = b"\x0a\x0e" + b"\x0a\x0c" + b"\x0a\x01n" + b"\x12\x07" + b"\x1a\x05" + b"\x0a\x03\x01\xac\x02"
    length = struct.pack("<Q", len(example))
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert encode_examples(pa.table({"n": [[1, 300]]})) == length + masked(length) + example + masked(example)


def test_nulls_and_slices():
    table = pa.table(
        {
            "floats": pa.array([[9.0], [1.5, None], None, []], pa.list_(pa.float64())),
            "texts": pa.array([["z"], ["a", "bc"], [], None], pa.list_(pa.string())),
            "number": pa.array([7, None, 8, 300], pa.int64()),
        }
    )
    whole = encode_examples(table)
    assert encode_examples(table.slice(0, 1)) + encode_examples(table.slice(1)) == whole
    assert encode_examples(table.slice(4)) == b""
    texts, floats = pa.array([[]], pa.list_(pa.string())), pa.array([[]], pa.list_(pa.float32()))
    assert encode_examples(table.slice(2, 1)) == encode_examples(
        pa.table({"floats": floats, "texts": texts, "number": [8]})
    )


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[1, None]]), "column 'x' has a null in a list; expected values, or floats"),
        (pa.array([{"a": 1}]), "column 'x' has type struct<a: int64>; expected integers, floats, text or lists"),
    ],
)
def test_columns_that_are_refused(column, message):
    with pytest.raises(ValueError, match=message):
        encode_examples(pa.table({"x": column}))


LOG = "user,item,rating,time\n" + "".join(f"ü{u},{item},{r},{t}\n" for u in range(5) for t, (item, r) in
                                          enumerate([("a", 4.5), ("b", ""), ("c", 1)][: 1 + u % 3]))  # fmt: skip


@pytest.mark.parametrize("kind", ["tfrecord", "tfrecord.gz"])
def test_sequences(build, tmp_path, kind):
    """The same sequences as in Parquet, user after user."""
    expected = load_sequences(build({"log.csv": LOG}, "log.csv", out="parquet")[0])
    directory, _ = build({"log.csv": LOG}, "log.csv", rows_per_file=2, format=kind)
    parts = sorted((directory / "sequences").iterdir())
    assert [part.name for part in parts] == [f"part-0000{i}-of-00003.{kind}" for i in range(3)]
    found = []
    for part in parts:
        path = tmp_path / "plain.tfrecord"
        path.write_bytes(gzip.decompress(part.read_bytes()) if kind.endswith("gz") else part.read_bytes())
        found += read(path, KINDS | {"ratings": "float"})
    assert [bytes(record["user_id"]).decode() for record in found] == expected.user_ids.tolist()
    for name in ("token_ids", "type_ids", "positions", "item_ids", "timestamps", "ratings"):
        joined = np.concatenate([record[name] for record in found])
        np.testing.assert_array_equal(joined, getattr(expected, name))
    assert [len(record["item_ids"]) for record in found] == np.diff(expected.cu_events).tolist()
