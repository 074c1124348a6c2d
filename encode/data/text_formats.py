"""Delimited text as Arrow columns of text: a block of lines at a time, nothing converted, nothing lost.

A line with another number of fields than the format has is no error here: it goes on, marked as malformed, so that
it ends in quarantine. Quotes have no meaning in these formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encode.errors import DataError

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BINARY = {b"PAR1": "Parquet", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Lines:
    """Consecutive lines of a file, without their ends. `first_row` counts the file's lines from 1."""

    first_row: int
    text: pa.StringArray
    undecodable: npt.NDArray[np.bool_]
    """Lines that are not UTF-8; their odd bytes are spelled `\\xNN` in `text`."""


def read_lines(file: pa.NativeFile, name: str) -> Iterator[Lines]:
    """Yield the lines of `file` in blocks. BOM, CRLF and blank lines at the end are dropped.

    Raises:
        DataError: the file is empty, compressed or otherwise not text.
    """
    rest, first_row = b"", 1
    block = file.read(BLOCK_BYTES)
    _refuse_binary(block, name)
    block = block.removeprefix(_BOM)
    while block:
        following = file.read(BLOCK_BYTES)
        data = rest + block
        # The last line that is not blank stays behind, for more of it, or nothing but blank lines, may follow.
        end = len(data.rstrip(b"\r\n"))
        cut = data.rfind(b"\n", 0, end) + 1 if following else end
        rest = data[cut:]
        if end - data.rfind(b"\n", 0, end) > MAX_LINE_BYTES:
            raise DataError(f"{name}: not text: found a line of more than {MAX_LINE_BYTES:,} bytes, expected rows")
        if cut:
            lines = _lines(data[:cut] if following else data[:cut] + b"\n", first_row)
            first_row += len(lines.text)
            yield lines
        block = following
    if first_row == 1:
        raise DataError(f"{name}: empty file, expected rows; remove it or export it again")


def split_lines(lines: Lines, separator: str, num_fields: int) -> tuple[list[pa.StringArray], npt.NDArray[np.bool_]]:
    """Cut each line into its fields.

    Returns:
        `num_fields` columns, and which lines are malformed: not UTF-8, or with more or fewer fields. Their fields
        are null.
    """
    counts = pc.count_substring(lines.text, separator).to_numpy(zero_copy_only=False)
    malformed = (counts != num_fields - 1) | lines.undecodable
    good = lines.text if not malformed.any() else lines.text.filter(pa.array(~malformed))
    flat = pc.split_pattern(good, separator).flatten()
    columns = [flat.take(pa.array(np.arange(i, len(flat), num_fields))) for i in range(num_fields)]
    if malformed.any():
        place = pa.array(np.cumsum(~malformed) - 1, mask=malformed)
        columns = [column.take(place) for column in columns]
    return columns, malformed


def header_of(lines: Lines, separator: str) -> Sequence[str]:
    """Return the fields of the first line."""
    first: str = lines.text[0].as_py()
    return first.split(separator)


def without_header(lines: Lines) -> Lines:
    """Return the lines after the first."""
    return Lines(lines.first_row + 1, lines.text[1:], lines.undecodable[1:])


def _lines(data: bytes, first_row: int) -> Lines:
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
    values = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(values == 10)
    offsets = np.concatenate([[0], ends - np.arange(len(ends))]).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(values[values != 10])]
    raw = pa.Array.from_buffers(pa.binary(), len(ends), buffers)
    text, undecodable = decode(raw)
    return Lines(first_row, text, undecodable)


def decode(raw: pa.Array) -> tuple[pa.StringArray, npt.NDArray[np.bool_]]:
    r"""Return bytes as text, and where they are not UTF-8: there the odd bytes are spelled `\xNN`."""
    undecodable = np.zeros(len(raw), bool)
    try:
        return raw.cast(pa.string()), undecodable
    except pa.ArrowInvalid:
        text = []
        for i, value in enumerate(raw.to_pylist()):
            try:
                text.append(None if value is None else value.decode())
            except UnicodeDecodeError:
                undecodable[i] = True
                text.append(value.decode(errors="backslashreplace"))
        return pa.array(text, pa.string()), undecodable


def _refuse_binary(data: bytes, name: str) -> None:
    for magic, what in _BINARY.items():
        if data.startswith(magic):
            raise DataError(f"{name}: found {what}, expected text; unpack or convert it, or set source.reader")
    if b"\0" in data[:4096]:
        raise DataError(f"{name}: found binary data (or UTF-16), expected UTF-8 text")
