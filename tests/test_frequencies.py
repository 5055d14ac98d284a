"""Inverse frequencies against the formula in forty digits; the table made of them, bit by bit."""

import decimal
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from rope_cupy import RotaryTable, apply_rotary
from rope_cupy.frequencies import inverse_frequencies


def numpy_array(array, dtype="float64"):
    return array.astype(dtype)


def torch_array(array, dtype="float64"):
    return torch.from_numpy(array).to(getattr(torch, dtype))


def jax_array(array, dtype="float32"):
    return pytest.importorskip("jax.numpy").asarray(array, dtype)


LIBRARIES = {"numpy": numpy_array, "torch": torch_array, "jax": jax_array}


def exact_frequencies(rotary_dim, base):
    """base ** (-2 i / rotary_dim) for each pair i, as decimal numbers of forty digits."""
    with decimal.localcontext() as context:
        context.prec = 40
        step = decimal.Decimal(-2) / rotary_dim
        return [decimal.Decimal(base) ** (step * pair) for pair in range(rotary_dim // 2)]


@pytest.mark.parametrize("rotary_dim", [2, 6, 64, 72, 128, 512])
@pytest.mark.parametrize("base", [1, 1.5, 256, 10000.0, 500_000, np.float32(1e6), 1e8, 0.25])
def test_inverse_frequencies_follow_the_formula(rotary_dim, base):
    exact = exact_frequencies(rotary_dim, float(base))
    actual = inverse_frequencies(rotary_dim, base)
    assert (actual.dtype, actual.shape) == (np.float64, (rotary_dim // 2,))
    # One rounding of the exponent, which the logarithm of the base magnifies, and one of the power.
    tolerance = (abs(math.log(base)) + 3) * 2.0**-53
    for value, number in zip(actual, exact, strict=True):
        assert abs(Fraction(float(value)) / Fraction(number) - 1) <= tolerance


def test_the_base_is_10000_unless_another_is_given():
    assert np.array_equal(inverse_frequencies(8), inverse_frequencies(8, base=10000))
    assert inverse_frequencies(np.int64(8))[2] == pytest.approx(0.01, rel=1e-15)


@pytest.mark.parametrize(
    ("error", "argument", "got", "rotary_dim", "base"),
    [
        (ValueError, "rotary_dim", "7", 7, 10000.0),
        (ValueError, "rotary_dim", "0", 0, 10000.0),
        (ValueError, "rotary_dim", "-2", -2, 10000.0),
        (TypeError, "rotary_dim", "8.0", 8.0, 10000.0),
        (TypeError, "rotary_dim", "True", True, 10000.0),
        (TypeError, "rotary_dim", "'8'", "8", 10000.0),
        (TypeError, "rotary_dim", "None", None, 10000.0),
        (ValueError, "base", "0", 8, 0),
        (ValueError, "base", "-1.0", 8, -1.0),
        (ValueError, "base", "nan", 8, math.nan),
        (ValueError, "base", "inf", 8, math.inf),
        (TypeError, "base", "'10000'", 8, "10000"),
        (TypeError, "base", "True", 8, True),
        (TypeError, "base", "None", 8, None),
        (TypeError, "base", r"\(1\+0j\)|complex", 8, 1 + 0j),
    ],
)
def test_what_gives_no_frequencies_is_refused(error, argument, got, rotary_dim, base):
    with pytest.raises(error, match=rf"^{argument} must .*, got .*({got})"):
        inverse_frequencies(rotary_dim, base)


def cos_sin_of(table, make=numpy_array):
    """The numbers of a table: the vectors (1, 0) turned by it."""
    x = np.zeros((table.num_positions, 1, table.rotary_dim))
    x[..., ::2] = 1
    turned = np.asarray(apply_rotary(make(x), table, interleaved=True))[:, 0]
    return turned[:, ::2], turned[:, 1::2]


INV_FREQS = {
    "numpy float64": lambda inv_freq: inv_freq,
    "numpy float32": lambda inv_freq: inv_freq.astype("float32"),
    "every other": lambda inv_freq: inv_freq.repeat(2)[::2],
    "torch float64": torch.from_numpy,
    "torch float32": lambda inv_freq: torch.from_numpy(inv_freq).float(),
    "torch bfloat16": lambda inv_freq: torch.from_numpy(inv_freq).bfloat16(),
    "jax": jax_array,
    "list": lambda inv_freq: inv_freq.tolist(),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", INV_FREQS)
def test_a_table_holds_cos_and_sin_of_float64_angles_rounded_once(kind, library):
    inv_freq = INV_FREQS[kind](inverse_frequencies(64, 1e6))
    like = LIBRARIES[library](np.zeros((3, 1, 64)))
    table = RotaryTable.from_inverse_frequencies(inv_freq, 1000, like=like)
    told = (table.dtype, table.device, table.shape, table.rotary_dim, table.num_positions)
    assert told == ("float32", "cpu", (1000, 32), 64, 1000)
    numbers = inv_freq.double().numpy() if isinstance(inv_freq, torch.Tensor) else inv_freq
    angles = np.outer(np.arange(1000.0), np.asarray(numbers, np.float64))
    cos, sin = cos_sin_of(table, LIBRARIES[library])
    assert np.array_equal(cos, np.cos(angles).astype(np.float32))
    assert np.array_equal(sin, np.sin(angles).astype(np.float32))


def test_a_far_position_has_the_angle_of_the_formula():
    mpmath = pytest.importorskip("mpmath")
    last, inv_freq = 131_071, inverse_frequencies(8)
    table = RotaryTable.from_inverse_frequencies(inv_freq, last + 1, like=np.zeros(1))
    cos, sin = (half[-1] for half in cos_sin_of(table))
    with mpmath.workdps(40):
        angles = [last * mpmath.mpf(10000) ** (-mpmath.mpf(pair) / 4) for pair in range(4)]
        exact_cos = [float(mpmath.cos(angle)) for angle in angles]
        exact_sin = [float(mpmath.sin(angle)) for angle in angles]
    # Half a unit of a float32 in the last place; the float64 angle itself is good to 2e-11 here.
    assert np.abs(cos - exact_cos).max() <= 2.0**-25 + 1e-10
    assert np.abs(sin - exact_sin).max() <= 2.0**-25 + 1e-10


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_table_made_like_x_rotates_x(library, dtype):
    if (library, dtype) == ("jax", "float64"):
        dtype = "bfloat16"  # JAX has no float64 unless it is asked for it
    x = LIBRARIES[library](np.ones((4, 2, 4)), dtype)
    table = RotaryTable.from_inverse_frequencies([1.0, 0.25], 4, like=x)
    y = apply_rotary(x, table)
    assert type(y) is type(x) and y.dtype == x.dtype
    angles = np.outer(np.arange(4), [1.0, 0.25])[:, None]
    cos, sin = np.cos(angles), np.sin(angles)
    exact = np.broadcast_to(np.concatenate([cos - sin, cos + sin], -1), x.shape)
    tolerance = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype, 2e-7)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, tolerance, 2e-7)


GOOD = {"inv_freq": [1.0, 0.5], "num_positions": 8, "like": np.zeros((5, 3, 4))}


@pytest.mark.parametrize(
    ("error", "argument", "got", "bad"),
    [
        (TypeError, "inv_freq", "str|abc", "abc"),
        (TypeError, "inv_freq", "None", None),
        (TypeError, "inv_freq", "a", ["a", "b"]),
        (TypeError, "inv_freq", "None", [1.0, None]),
        (TypeError, "inv_freq", r"\[1.0\]", [[1.0], [1.0, 2.0]]),
        (TypeError, "inv_freq", "complex|ndarray", np.ones(2, complex)),
        (TypeError, "inv_freq", "complex|Tensor", torch.ones(2, dtype=torch.complex64)),
        (ValueError, "inv_freq", "meta", torch.ones(2, device="meta")),
        (ValueError, "inv_freq", r"\(2, 2\)|2", np.ones((2, 2))),
        (ValueError, "inv_freq", r"\(\)|0", np.ones(())),
        (ValueError, "inv_freq", r"\(0,\)|0|\[\]", []),
        (TypeError, "num_positions", "8.0|float", 8.0),
        (TypeError, "num_positions", "True|bool", True),
        (TypeError, "num_positions", "None", None),
        (ValueError, "num_positions", "-1", -1),
        (TypeError, "like", "None", None),
        (TypeError, "like", "list", [1.0]),
        (TypeError, "like", "str|cpu", "cpu"),
    ],
    ids=lambda value: str(value) if isinstance(value, str | float) else None,
)
def test_what_gives_no_table_is_refused(error, argument, got, bad):
    with pytest.raises(error, match=rf"^{argument} must .*, got .*({got})"):
        RotaryTable.from_inverse_frequencies(**GOOD | {argument: bad})
