"""Whole numbers out of columns of any type, exactly or not at all.

Ids must survive unchanged: 3, 3.0, "3" and "3.0" are the integer 3; 3.5 is none; a float too large to tell
neighbors apart is refused rather than rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encode.data.text_formats import decode

OK, MISSING, NOT_INTEGER, INEXACT = range(4)
NO_VALUE = ("", "nan", "NaN", "NAN", "null", "NULL", "None", "NA", "\\N")
"""Spellings of "no value" in text columns."""
_INTEGER = r"^(?P<sign>[+-]?)0*(?P<digits>[0-9]+)(?:\.0*)?$"
_PLAIN = "^[0-9]{1,18}$"
"""Text that Arrow reads as it is, which is much faster; all of a healthy log looks like this."""
_LARGEST = str(np.iinfo(np.int64).max)


class Integers(NamedTuple):
    """A column as int64 [N]; where `problem` is not OK, the value is 0."""

    values: npt.NDArray[np.int64]
    problem: npt.NDArray[np.int8]


def read_integers(column: pa.Array) -> Integers:
    """Read a column of integers, floats, decimals, text, or a dictionary of these."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return read_integers(column.dictionary_decode())
    if pa.types.is_integer(kind):
        return _from_integers(column)
    if pa.types.is_floating(kind):
        return _from_floats(column)
    if pa.types.is_decimal(kind):
        return _from_text(column.cast(pa.string()))
    if is_text(kind):
        return _from_text(as_text(column))
    # Nulls, booleans, dates: nothing here is an integer.
    missing = column.is_null().to_numpy(zero_copy_only=False)
    return Integers(np.zeros(len(column), np.int64), np.where(missing, MISSING, NOT_INTEGER).astype(np.int8))


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a type is text, or bytes as older writers store text."""
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in (*checks, pa.types.is_binary, pa.types.is_large_binary))


def as_text(column: pa.Array) -> pa.StringArray:
    """Return any column as text: numbers and times as they print, text as it is, nulls as null."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return as_text(column.dictionary_decode())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return decode(column.cast(pa.binary()))[0]
    return column.cast(pa.string())


def _from_integers(column: pa.Array) -> Integers:
    missing = column.is_null().to_numpy(zero_copy_only=False)
    filled = pc.fill_null(column, 0).to_numpy()
    problem = np.where(missing, MISSING, OK).astype(np.int8)
    if filled.dtype == np.uint64:
        problem[filled > np.uint64(np.iinfo(np.int64).max)] = INEXACT
    return Integers(np.where(problem == OK, filled.astype(np.int64), 0), problem)


def _from_floats(column: pa.Array) -> Integers:
    limit = 2.0 ** {16: 11, 32: 24, 64: 53}[column.type.bit_width]
    values = pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy()
    whole = np.isfinite(values) & (np.floor(values) == values)
    problem = np.select(
        [np.isnan(values), ~whole, np.abs(values) >= limit],
        [MISSING, NOT_INTEGER, INEXACT],
        OK,
    ).astype(np.int8)
    return Integers(np.where(problem == OK, values, 0).astype(np.int64), problem)


def _from_text(column: pa.StringArray) -> Integers:
    if len(column) and column.null_count == 0 and pc.all(pc.match_substring_regex(column, _PLAIN)).as_py():
        return Integers(column.cast(pa.int64()).to_numpy(), np.zeros(len(column), np.int8))
    trimmed = pc.utf8_trim_whitespace(column)
    missing = pc.fill_null(pc.is_in(trimmed, pa.array(NO_VALUE)), True).to_numpy(zero_copy_only=False)
    missing |= column.is_null().to_numpy(zero_copy_only=False)
    found = pc.extract_regex(trimmed, _INTEGER)
    matched = found.is_valid().to_numpy(zero_copy_only=False)
    sign, digits = pc.struct_field(found, "sign"), pc.struct_field(found, "digits")
    length = pc.fill_null(pc.utf8_length(digits), 0).to_numpy()
    large = length > len(_LARGEST)
    if (length == len(_LARGEST)).any():
        beyond = pc.fill_null(pc.greater(digits, _LARGEST), False).to_numpy(zero_copy_only=False)
        large |= (length == len(_LARGEST)) & beyond
    problem = np.select([missing, ~matched, large], [MISSING, NOT_INTEGER, INEXACT], OK).astype(np.int8)
    usable = pa.array(problem == OK)
    values = pc.if_else(usable, digits, "0").cast(pa.int64()).to_numpy()
    negative = pc.fill_null(pc.equal(sign, "-"), False).to_numpy(zero_copy_only=False)
    return Integers(np.where(negative, -values, values), problem)
