"""Rows as TFRecord files of tf.train.Example, without TensorFlow: whole columns become protocol buffers at once.

The format of the file is TensorFlow's (`tensorflow/core/lib/io/record_writer.h`), that of a record its
`tensorflow/core/example/example.proto`; numbers are packed, as proto3 writes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_VALUES = b"\x0a"  # field 1 of BytesList, FloatList and Int64List, of Features and of Example; the key of a map entry
_LIST_OF = {"bytes": b"\x0a", "float": b"\x12", "int64": b"\x1a"}  # fields 1, 2 and 3 of Feature
_MAP_VALUE = b"\x12"


def encode_examples(table: pa.Table) -> bytes:
    """The records of a TFRecord file: one Example per row, one feature per column.

    Columns hold integers, floats, text or bytes, or lists of them; integers become int64 lists, floats float32 lists. A
    null is an empty list, in a list of floats NaN. Raises ValueError that names a column of another type, or a list of
    integers or text with a null in it.
    """
    if not len(table):
        return b""
    features = [_entry(name, *_feature_list(name, table[name].combine_chunks())) for name in table.column_names]
    return _frame(_field(_VALUES, _join(*features)))


def _entry(name: str, kind: str, values: pa.Array) -> pa.Array:
    """One entry of the map from names to features per row."""
    key = name.encode()
    feature = _field(_MAP_VALUE, _field(_LIST_OF[kind], values))
    tag = _VALUES + _varints(np.array([len(key)]))[0].tobytes() + key
    return _field(_VALUES, _join(_scalar(tag), feature))


def _feature_list(name: str, column: pa.Array) -> tuple[str, pa.Array]:
    """What a column is a list of, and an Int64List, FloatList or BytesList per row, as bytes."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        values, kind = column.flatten(), kind.value_type
    else:
        lengths = pc.is_valid(column).to_numpy(zero_copy_only=False).astype(np.int64)
        values = column.drop_null()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if pa.types.is_floating(kind):
        numbers = pc.fill_null(values.cast(pa.float32()), np.nan).to_numpy().astype("<f4")
        return "float", _packed(_slices(offsets * 4, numbers))
    if values.null_count:
        raise ValueError(f"column {name!r} has a null in a list; expected values, or floats")
    if pa.types.is_integer(kind):
        data, ends = _varints(values.cast(pa.int64()).to_numpy())
        return "int64", _packed(_slices(ends[offsets], data))
    if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind):
        texts = _field(_VALUES, values.cast(pa.large_binary()))
        ends = np.concatenate([[0], np.cumsum(pc.binary_length(texts).to_numpy())])
        data = np.frombuffer(b"".join(texts.to_pylist()), np.uint8)
        return "bytes", _slices(ends[offsets], data)
    raise ValueError(f"column {name!r} has type {column.type}; expected integers, floats, text or lists of them")


def _packed(lists: pa.Array) -> pa.Array:
    """Field 1, repeated and packed; nothing for an empty list."""
    return pc.if_else(pc.equal(pc.binary_length(lists), 0), lists, _field(_VALUES, lists))


def _field(tag: bytes, messages: pa.Array) -> pa.Array:
    """A length-delimited field per row: its tag, the length, the message."""
    data, ends = _varints(pc.binary_length(messages).to_numpy())
    return _join(_scalar(tag), _slices(ends, data), messages)


def _join(*pieces: pa.Array | pa.Scalar) -> pa.Array:
    """The pieces of every row end to end."""
    return pc.binary_join_element_wise(*pieces, _scalar(b""))


def _scalar(value: bytes) -> pa.Scalar:
    return pa.scalar(value, pa.large_binary())


def _slices(offsets: NDArray[np.int64], data: NDArray[Any]) -> pa.Array:
    """Bytes per row, lying end to end in `data`."""
    buffers = [None, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def _varints(values: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Base-128 varints end to end, seven bits a byte from the lowest, and the offsets (len + 1,) where they begin."""
    rest = values.astype(np.int64).view(np.uint64)
    sizes = np.ones(len(rest), np.int64)
    for power in range(1, 10):
        sizes += rest >= np.uint64(1 << 7 * power)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    data = np.empty(offsets[-1], np.uint8)
    begins = offsets[:-1]
    for place in range(int(sizes.max(initial=0))):
        more = sizes > place + 1
        data[begins + place] = (rest & np.uint64(0x7F)) | np.where(more, np.uint64(0x80), np.uint64(0))
        rest, sizes, begins = rest[more] >> np.uint64(7), sizes[more], begins[more]
    return data, offsets


def _frame(records: pa.Array) -> bytes:
    """Length, its masked CRC, the record, its masked CRC; all little-endian."""
    lengths = pc.binary_length(records).to_numpy().astype("<u8")
    head = np.empty(len(records), np.dtype([("length", "<u8"), ("crc", "<u4")]))
    head["length"] = lengths
    head["crc"] = _masked_crcs(_slices(np.arange(len(records) + 1) * 8, lengths))
    tail = _masked_crcs(records)
    rows = np.arange(len(records) + 1)
    framed = _join(_slices(rows * 12, head), records, _slices(rows * 4, tail))
    offsets = np.frombuffer(framed.buffers()[1], np.int64)
    return memoryview(framed.buffers()[2])[offsets[framed.offset] : offsets[framed.offset + len(framed)]].tobytes()


def _masked_crcs(messages: pa.Array) -> NDArray[np.uint32]:
    """CRC-32C of every message, rotated right by 15 bits plus a constant, as record files want it."""
    import google_crc32c  # only who writes TFRecord needs it

    crcs = np.fromiter((google_crc32c.value(message) for message in messages.to_pylist()), np.uint32, len(messages))
    return (((crcs >> np.uint32(15)) | (crcs << np.uint32(17))) + np.uint32(0xA282EAD8)).astype("<u4")
