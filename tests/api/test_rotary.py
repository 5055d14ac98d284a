"""Rotations of every kind against the float64 reference; on a GPU too where marked so."""

import cmath
import math

import numpy as np
import pytest
from arrays import (
    OPTIONS,
    Case,
    hold,
    in_both_pairings,
    in_every_library,
    on_every,
    possible,
    sample,
    verify,
)
from reference import (
    FORMATS,
    check,
    decode,
    encode,
    rotate,
    rounded,
    to_bits,
    to_float64,
    ulp_distance,
)

from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk, cpu

CASES = sample(400, seed=1, library=["numpy", "torch", "dlpack"])
INT_MIN = -(2**31)


class Example:
    """x (2, 7, 3, 16) and a table of 9 positions, as arrays of a library and as exact values."""

    def __init__(self, library, dtype="float32", table_dtype="float32", x=None):
        rng = np.random.default_rng(8)
        angle = rng.uniform(-np.pi, np.pi, (9, 8))
        self.cos, self.sin = (rounded(part, table_dtype) for part in (np.cos(angle), np.sin(angle)))
        self.library, self.dtype = library, dtype
        self.exact_x = rounded(rng.standard_normal((2, 7, 3, 16)) if x is None else x, dtype)
        self.x = self.array(self.exact_x)
        self.table = self.make_table(self.cos, self.sin, table_dtype)

    def array(self, values, dtype=None, style="dense"):
        return hold(values, dtype or self.dtype, self.library, style).array

    def make_table(self, cos, sin, dtype="float32"):
        return RotaryTable(self.array(cos, dtype), self.array(sin, dtype))

    def exact(self, **options):
        return rotate(self.exact_x, self.cos, self.sin, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_call_of_any_kind_is_right(case, record):
    errors = verify(case)
    record(case.kind, *errors)
    # On the CPU all is computed in float64 and rounded once: exactly what is asked for.
    as_wanted = case.dtype == "float64" or case.rounding == "eager"
    assert as_wanted or not any(error.unequal for error in errors)


def test_the_calls_of_any_kind_include_every_value_of_every_option():
    for name, values in OPTIONS.items():
        seen = {getattr(case, name) for case in CASES}
        assert seen >= set(values) - {"same", "other"}, name
    assert {case.library == case.table_library for case in CASES} == {False, True}


@in_both_pairings
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("positions", ["none", "int64 bs"])
@pytest.mark.parametrize("write", ["new", "in place"])
def test_a_long_sequence_is_right(dtype, interleaved, positions, write, record, monkeypatch):
    """NumPy rotates it by blocks: here a batch of q is three, the last a part; all of k are one."""
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", 1 << 13)
    case = Case(dtype, interleaved=interleaved, head=(64, 64, 0), sizes=(2, 40, 8, 1))
    case = case._replace(positions=positions, write=write, outside="keep")
    record(dtype, *verify(possible(case)))


@in_every_library
@in_both_pairings
@pytest.mark.parametrize("heads", [(8, 1), (8, 2), (1, 8), (5, 3)], ids=str)
def test_q_and_k_may_have_any_numbers_of_heads(library, interleaved, heads, record):
    case = Case("bfloat16", interleaved=interleaved, library=library, sizes=(2, 5, *heads))
    record("bfloat16", *verify(possible(case._replace(k_style="packed"))))


@on_every("jax", "jax-cuda")
@in_both_pairings
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("table_library", ["same", "other"])
def test_jax_arrays_give_jax_arrays(library, interleaved, dtype, table_library, record):
    case = Case(dtype, interleaved=interleaved, library=library, table_library=table_library)
    for positions in ("none", "int32 bs"):
        record(dtype, *verify(possible(case._replace(positions=positions, outside="nan"))))


@in_every_library
@in_both_pairings
def test_the_conjugate_rotates_back(library, interleaved):
    example = Example(library, "float64", "float64")
    there = apply_rotary(example.x, example.table, interleaved=interleaved)
    back = apply_rotary(there, example.table, interleaved=interleaved, conjugate=True)
    assert not np.allclose(to_float64(there), example.exact_x)
    check(to_float64(back), example.exact_x, "float64")


@in_every_library
@pytest.mark.parametrize("dtype", FORMATS)
def test_q_and_k_together_are_as_each_alone(library, dtype):
    example = Example(library, dtype)
    q, k = example.x, example.array(example.exact_x[:, :, ::2], style="ragged")
    positions = example.array(np.arange(7) + 1, "int64")
    together = apply_rotary_qk(q, k, example.table, positions=positions)
    for x, y in zip((q, k), together, strict=True):
        alone = apply_rotary(x, example.table, positions=positions)
        assert np.array_equal(to_bits(y), to_bits(alone))
        assert not np.array_equal(to_bits(y), to_bits(x))


@in_every_library
@pytest.mark.parametrize("kind", ["int32", "int64"])
@pytest.mark.parametrize("out_of_range", ["nan", "keep"])
def test_a_position_beside_the_table_reads_nothing_there(library, kind, out_of_range):
    """The table is a slice of a longer one: what lies beside it would pass for one of its rows."""
    example = Example(library)
    longer = (example.array(np.tile(part, (3, 1))) for part in (example.cos, example.sin))
    table = RotaryTable(*(part[9:18] for part in longer))
    positions = np.array([-1, 9, 0, 8, INT_MIN, 17, 10], np.int64)
    if kind == "int64":
        positions[4:] = -(2**63), 2**32, 2**32 + 3
    x, options = example.x, {"positions": positions, "out_of_range": out_of_range}
    y = apply_rotary(x, table, **options | {"positions": example.array(positions, kind)})
    check(to_float64(y), example.exact(**options), "float32")
    for token, position in enumerate(positions):
        kept = np.array_equal(to_float64(y)[:, token], example.exact_x[:, token])
        lost = np.isnan(to_float64(y)[:, token]).all()
        fate = "inside" if 0 <= position < 9 else out_of_range
        assert (kept, lost) == (fate == "keep", fate == "nan")


@in_every_library
@pytest.mark.parametrize("out_of_range", ["nan", "keep"])
def test_no_position_lies_in_an_empty_table(library, out_of_range):
    example = Example(library)
    table = example.make_table(example.cos[:0], example.sin[:0])
    positions = example.array(np.arange(7), "int32")
    y = to_float64(apply_rotary(example.x, table, positions=positions, out_of_range=out_of_range))
    assert np.isnan(y).all() if out_of_range == "nan" else np.array_equal(y, example.exact_x)


@in_every_library
@pytest.mark.parametrize("positions", [None, [[8, 0, 3, 3, 7, 1, 2]] * 2], ids=["none", "array"])
@pytest.mark.parametrize("styles", [("dense", "padded"), ("ragged", "dense")], ids="-".join)
def test_cosines_and_sines_have_strides_of_their_own(library, positions, styles):
    example = Example(library)
    parts = zip((example.cos, example.sin), styles, strict=True)
    table = RotaryTable(*(example.array(part, style=style) for part, style in parts))
    rows = None if positions is None else example.array(positions, "int64")
    y = apply_rotary(example.x, table, positions=rows)
    exact = example.exact(positions=None if positions is None else np.array(positions))
    check(to_float64(y), exact, "float32")


@in_every_library
@in_both_pairings
@pytest.mark.parametrize("dtype", FORMATS)
def test_infinities_and_nans_propagate_as_in_ieee_arithmetic(library, interleaved, dtype):
    x = np.random.default_rng(3).standard_normal((2, 7, 3, 16))
    kinds = [np.inf, -np.inf, np.nan, 0.0, -0.0]
    x[0, :5, :, 0] = np.array(kinds)[:, None]  # beside a number
    x[1, :5] = np.resize(kinds, (5, 3, 16))  # beside each other
    example = Example(library, dtype, x=x)
    y = apply_rotary(example.x, example.table, interleaved=interleaved)
    check(to_float64(y), example.exact(interleaved=interleaved), dtype)


@in_every_library
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("size", ["greatest", "least"])
def test_the_greatest_and_the_least_numbers_are_rotated(library, dtype, size):
    """Some results overflow; some are subnormal, where a unit in the last place is what counts."""
    exponent_bits, mantissa_bits, *_ = FORMATS[dtype]
    bias = (1 << exponent_bits - 1) - 1
    most = math.ldexp(2 - 2.0**-mantissa_bits, bias)
    scale = most / 2 if size == "greatest" else math.ldexp(1.0, -bias - 4)
    x = np.clip(scale * Example(library).exact_x, -most, most)
    example = Example(library, dtype, x=x)
    y = to_float64(apply_rotary(example.x, example.table))
    exact = example.exact()
    finite = np.isfinite(rounded(exact, dtype))
    assert (~finite).any() == (size == "greatest")
    assert ulp_distance(y, exact, dtype)[finite].max() <= 1
    assert np.array_equal(y[~finite], rounded(exact, dtype)[~finite], equal_nan=True)


@in_every_library
@in_both_pairings
def test_cancellation_costs_no_digits(library, interleaved, record):
    """Vectors that are rotated onto an axis: one of a pair's two results is next to nothing."""
    example = Example(library)
    onto_axis = np.stack([example.sin, example.cos], -1 if interleaved else -2)[:7]
    x = onto_axis.reshape(7, 1, 16) * (1 + 1e-6 * example.exact_x)
    example = Example(library, x=x)
    y = to_float64(apply_rotary(example.x, example.table, interleaved=interleaved))
    exact = example.exact(interleaved=interleaved)
    assert np.abs(exact).min() < 1e-6
    assert ulp_distance(y, exact, "float32").max() <= 2
    record("float32", check(y, exact, "float32"))


@pytest.mark.launches_nothing
@in_every_library
@pytest.mark.parametrize("axis", range(3), ids=["no batch", "no tokens", "no heads"])
@pytest.mark.parametrize("write", ["new", "out", "in place"])
def test_where_nothing_is_to_rotate_nothing_is_done(library, axis, write):
    shape = [2, 7, 3, 16]
    shape[axis] = 0
    case = Case("float32", head=(16, 16, 0), sizes=(*shape[:3], 0), style="padded")
    for positions in ("none", "int64 bs", "int32 s"):
        verify(possible(case._replace(library=library, positions=positions, write=write)))


@in_every_library
def test_a_k_without_heads_leaves_q_to_rotate(library):
    example = Example(library)
    q, k = apply_rotary_qk(example.x, example.array(example.exact_x[:, :, :0]), example.table)
    check(to_float64(q), example.exact(), "float32")
    assert tuple(k.shape) == (2, 7, 0, 16)


# The reference and the canaries themselves.


@in_both_pairings
@pytest.mark.parametrize("conjugate", [False, True], ids=["forward", "conjugate"])
def test_the_reference_multiplies_complex_numbers(interleaved, conjugate):
    rng = np.random.default_rng(4)
    x, angle = rng.standard_normal((2, 3, 2, 9)), rng.uniform(-4, 4, (5, 3))
    positions, offset = np.array([[4, 0, 5], [1, 1, -1]]), 2
    y = rotate(
        x,
        np.cos(angle),
        np.sin(angle),
        interleaved=interleaved,
        positions=positions,
        rotary_offset=offset,
        conjugate=conjugate,
        out_of_range="keep",
    )
    for batch, token, head, pair in np.ndindex(2, 3, 2, 3):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 3)
        before, after = (complex(*z[batch, token, head, [offset + i, offset + j]]) for z in (x, y))
        row = positions[batch, token]
        factor = cmath.rect(1, angle[row, pair] * (-1 if conjugate else 1)) if 0 <= row < 5 else 1
        assert abs(after - before * factor) < 1e-14
    assert np.array_equal(y[..., [0, 1, 8]], x[..., [0, 1, 8]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_reference_rounds_once_to_nearest_even(dtype):
    bits = FORMATS[dtype].bits
    infinity = int(encode(np.array([np.inf]), dtype)[0])
    codes = np.unique(np.linspace(0, infinity - 1, 1 << 16).astype(bits))
    low, high = decode(codes, dtype), decode(codes + bits(1), dtype)
    high[-1] = 2 * low[-1] - decode(codes[-1:] - bits(1), dtype)[0]  # where infinity begins
    middle = (low + high) / 2
    assert np.array_equal(encode(low, dtype), codes)
    assert np.array_equal(encode(-low[1:], dtype), codes[1:] | bits(1 << codes.itemsize * 8 - 1))
    assert np.array_equal(encode(np.nextafter(middle, 0), dtype), codes)
    assert np.array_equal(encode(np.nextafter(middle, np.inf), dtype), codes + bits(1))
    assert np.array_equal(encode(middle, dtype), codes + (codes & bits(1)))
    assert np.isnan(decode(encode(np.array([np.nan]), dtype), dtype)).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_check_finds_what_is_wrong(dtype):
    exact = rounded(np.random.default_rng(5).standard_normal(10_000), dtype)
    bits = encode(exact, dtype)
    assert check(exact, exact, dtype) == (0.0, 0, 0, 10_000)
    off = 2 if FORMATS[dtype].tolerance is None else 1 << 16
    far = decode(bits + bits.dtype.type(off), dtype)[7]
    for value in (far, np.nan, np.inf):
        wrong = exact.copy()
        wrong[7] = value
        with pytest.raises(AssertionError, match=dtype):
            check(wrong, exact, dtype)
    for share, right in ((2000, True), (500, False)):
        near = decode(bits + (np.arange(10_000) % share == 0), dtype)
        if FORMATS[dtype].tolerance is None and not right:
            with pytest.raises(AssertionError, match=dtype):
                check(near, exact, dtype)
        else:
            assert check(near, exact, dtype).unequal == 10_000 // share


@in_every_library
@in_both_pairings
@pytest.mark.parametrize("dtype", FORMATS)
def test_at_the_angle_0_every_bit_stays_also_of_a_negative_zero(library, interleaved, dtype):
    x = np.random.default_rng(5).standard_normal((2, 7, 3, 16))
    x[:, ::2], x[:, 1::4, :, ::2] = np.copysign(0.0, x[:, ::2]), -0.0
    example = Example(library, dtype, x=x)
    table = example.make_table(np.ones((9, 8)), np.zeros((9, 8)))
    y = apply_rotary(example.x, table, interleaved=interleaved)
    back = apply_rotary(y, table, interleaved=interleaved, conjugate=True)
    # A negative zero stays where a positive zero is not added to it: -0 - 0 is -0, -0 + 0 is 0.
    exact = example.exact_x
    cos, sin = np.ones((9, 8)), np.zeros((9, 8))
    expected = rotate(exact, cos, sin, interleaved=interleaved)
    assert np.array_equal(np.signbit(to_float64(y)), np.signbit(expected))
    assert np.array_equal(to_float64(y), exact) and np.array_equal(to_float64(back), exact)
