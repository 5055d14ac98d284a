"""Sums of an int, an offset and the number of a token: one that 64 bits do not hold is no row."""

import numpy as np
import pytest
from arrays import hold, in_every_library
from reference import to_float64

from rope_cupy import RotaryTable, apply_rotary

TOKENS, ROWS = 4, 6
MOST, LEAST = 2**63 - 1, -(2**63)
COS = np.arange(1.0, ROWS + 1)[:, None]  # a row's number plus 1, by which an element is multiplied


def rotated(library, offsets=None, begins=None, positions=None, tokens=TOKENS):
    """The row of each token, NaN where there is none, by a table that tells its rows."""
    rows = {"positions": positions}
    if offsets is not None:
        rows["seqlen_offsets"] = hold(*offsets, library).array
    if begins is not None:
        rows["cu_seqlens"] = hold(*begins, library).array
    table = RotaryTable(*(hold(x, "float64", library).array for x in (COS, 0 * COS)))
    shape = (tokens, 1, 2) if begins else (1, tokens, 1, 2)
    x = hold(np.ones(shape), "float64", library)
    y = to_float64(apply_rotary(x.array, table, **rows))
    return [None if np.isnan(row) else int(row) - 1 for row in y[..., 0].ravel()]


@in_every_library
@pytest.mark.parametrize(
    ("positions", "offset", "rows"),
    [
        (MOST, MOST, [None] * 4),
        (LEAST, LEAST, [None] * 4),
        (MOST, 1, [None] * 4),
        (LEAST, -1, [None] * 4),
        (MOST, -MOST, [0, 1, 2, 3]),
        (MOST, LEAST, [None, 0, 1, 2]),
        (LEAST, MOST, [None, 0, 1, 2]),
        (MOST - 1, LEAST, [None, None, 0, 1]),
        (2**62, -(2**62) + 3, [3, 4, 5, None]),
        (0, MOST, [None] * 4),
        (5, -7, [None, None, 0, 1]),
    ],
)
def test_the_sum_of_a_position_and_a_batchs_offset(positions, offset, rows, library):
    assert rotated(library, ([offset], "int64"), positions=positions) == rows


@in_every_library
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize(
    ("positions", "offsets", "rows"),
    [
        (MOST, [MOST, -MOST], [None, None, 0, 1]),
        (LEAST, [MOST, LEAST], [None, 0, None, None]),
        (None, [MOST, 2], [None, None, 2, 3]),
        (-3, [3, MOST], [0, 1, None, None]),
        (2**62, [2**62, -(2**62)], [None, None, 0, 1]),
    ],
)
def test_the_sum_of_a_position_and_a_sequences_offset(positions, offsets, rows, dtype, library):
    begins = [0, 2, 4], dtype
    assert rotated(library, (offsets, "int64"), begins, positions) == rows


@in_every_library
def test_a_sequence_that_begins_before_all_numbers_of_tokens(library):
    """Token - begin is 2^63 and more, which an offset may bring back into the table."""
    assert rotated(library, None, ([LEAST, 4], "int64")) == [None] * 4
    assert rotated(library, ([LEAST], "int64"), ([LEAST, 4], "int64")) == [0, 1, 2, 3]
    assert rotated(library, ([LEAST + 1], "int64"), ([LEAST + 1, 4], "int64")) == [0, 1, 2, 3]


@in_every_library
@pytest.mark.parametrize("dtypes", [("int32", "int64"), ("int64", "int32")])
def test_offsets_and_begins_of_sequences_need_not_share_a_dtype(dtypes, library):
    offsets, begins = ([2, -1], dtypes[0]), ([0, 1, 4], dtypes[1])
    assert rotated(library, offsets, begins) == [2, None, 0, 1]
