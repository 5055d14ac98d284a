"""JAX's transforms of functions: right under jit, grad and vmap, and bit by bit what is eager."""

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from reference import FORMATS, arranged, canonical, check, rotate, to_bits, to_float64

import rope_cupy
from rope_cupy import (
    RotaryTable,
    apply_norm_rotary,
    apply_qk_norm_rotary,
    apply_rotary,
    apply_rotary_kv_cache,
    apply_rotary_qk,
    apply_rotary_qkv,
    join_qkv,
)

jax = pytest.importorskip("jax")
jnp = jax.numpy

BATCH, TOKENS, HEADS, KV_HEADS, D, PAIRS = 2, 5, 4, 2, 12, 4
ROWS = TOKENS + 4


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], autouse=True)
def device(request):
    """A device of JAX on which all arrays are made, and all programs run."""
    found = [each for each in jax.devices() if each.platform == "gpu"]
    if request.param == "gpu" and not found:
        pytest.skip("JAX has no GPU here")
    device = found[0] if request.param == "gpu" else jax.devices("cpu")[0]
    with jax.default_device(device):
        yield device


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def angles_of(rng, *shape):
    return rng.uniform(-3, 3, shape)


def two(cos, sin):
    return cos, sin


def full_width(cos, sin):
    return RotaryTable.from_full_width(jnp.tile(cos, 2), jnp.tile(sin, 2))


def elementwise(cos, sin):
    return RotaryTable.from_elementwise(jnp.tile(cos, 2), jnp.tile(sin, 2))


def cache(cos, sin):
    return RotaryTable.from_cache(jnp.concatenate([cos, sin], -1))


def complex_numbers(cos, sin):
    return RotaryTable.from_complex(jax.lax.complex(cos, sin))


def matrices(cos, sin):
    stacked = jnp.stack([cos, -sin, sin, cos], -1)
    return RotaryTable.from_matrices(stacked.reshape(*cos.shape, 2, 2))


FORMS = {
    form.__name__: form for form in (two, full_width, elementwise, cache, complex_numbers, matrices)
}


def assert_same(jitted, eager):
    """Assert that two results have the same bits."""
    for own, other in zip(jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True):
        assert isinstance(own, jax.Array)
        assert own.dtype == other.dtype
        assert own.devices() == other.devices()
        assert np.array_equal(to_bits(own), to_bits(other))


def assert_right(result, x, cos, sin, dtype, layout="bshd", **options):
    """Hold a result against the reference, of values as they are in memory."""
    exact = rotate(canonical(to_float64(x), layout), to_float64(cos), to_float64(sin), **options)
    flat = canonical(to_float64(result), layout)
    check(flat, exact, dtype)


# Values.


@pytest.mark.parametrize("is_traced", [True, False], ids=["traced table", "constant table"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_table_is_read(form, is_traced, rng):
    angles = angles_of(rng, ROWS, PAIRS)
    cos, sin = jnp.asarray(np.cos(angles), "float32"), jnp.asarray(np.sin(angles), "float32")
    q = jnp.asarray(rng.standard_normal((BATCH, TOKENS, HEADS, D)), "float32")
    k = jnp.asarray(rng.standard_normal((BATCH, TOKENS, KV_HEADS, D)), "float32")
    made = FORMS[form]

    def run(q, k, cos, sin):
        return apply_rotary_qk(q, k, made(cos, sin), positions=2)

    constant = made(cos, sin)
    jitted = jax.jit(
        run if is_traced else lambda q, k, *_: apply_rotary_qk(q, k, constant, positions=2)
    )
    results = jitted(q, k, cos, sin)
    interleaved = form in ("complex_numbers", "matrices")
    for result, x in zip(results, (q, k), strict=True):
        assert_right(result, x, cos, sin, "float32", positions=2, interleaved=interleaved)
    assert_same(results, run(q, k, cos, sin))


@pytest.mark.parametrize("table_dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_dtype_is_rounded_once(dtype, table_dtype, interleaved, rng):
    with jax.enable_x64("float64" in (dtype, table_dtype)):
        angles = angles_of(rng, ROWS, PAIRS)
        cos, sin = (jnp.asarray(f(angles), table_dtype) for f in (np.cos, np.sin))
        x = jnp.asarray(rng.standard_normal((BATCH, TOKENS, HEADS, D)), dtype)
        run = partial(apply_rotary, interleaved=interleaved, rotary_offset=3)
        result = jax.jit(run)(x, (cos, sin))
        assert_right(result, x, cos, sin, dtype, interleaved=interleaved, rotary_offset=3)
        assert_same(result, run(x, (cos, sin)))


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "shd", "thd", "hsd"])
@pytest.mark.parametrize("splits", [False, True])
def test_every_layout_is_read(layout, splits, rng):
    if splits and layout[-2:] != "hd":
        with pytest.raises(ValueError, match="must end in 'hd'"):
            jax.jit(lambda x: apply_rotary(x, (x, x), layout=layout, head_dim=D))(jnp.ones((4, D)))
        return
    angles = angles_of(rng, ROWS, PAIRS)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    options = {"head_dim": D} if splits else {}

    def given(heads):
        plain = rng.standard_normal((BATCH if "b" in layout else 1, TOKENS, heads, D))
        return jnp.asarray(arranged(plain, layout, flat=splits), "float32")

    q, k = given(HEADS), given(KV_HEADS)
    run = partial(apply_rotary_qk, layout=layout, **options)
    results = jax.jit(run)(q, k, (cos, sin))
    for result, x in zip(results, (q, k), strict=True):
        exact = rotate(
            canonical(to_float64(x), layout, **options), to_float64(cos), to_float64(sin)
        )
        check(canonical(to_float64(result), layout, **options), exact, "float32")
    assert_same(results, run(q, k, (cos, sin)))


BY_BATCH = [[8, 0, 3, -3, 1], [2, 2, 100, 7, 5]]
POSITIONS = {
    "none": {},
    "an int": {"positions": 3},
    "of tokens": {"positions": [4, 0, 8, -1, 9]},
    "of batches": {"positions": BY_BATCH},
    "kept": {"positions": BY_BATCH, "out_of_range": "keep"},
    "three axes": {
        "positions": [[BY_BATCH[0]], [BY_BATCH[1]], [[0] * 5]],
        "mrope_section": (1, 2, 1),
    },
    "interleaved axes": {
        "positions": [BY_BATCH, BY_BATCH[::-1], [[1] * 5] * 2],
        "mrope_section": (2, 1, 1),
        "mrope_interleaved": True,
    },
}


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("is_traced", [True, False])
@pytest.mark.parametrize("case", POSITIONS)
def test_positions_of_every_shape_are_read(case, is_traced, dtype, rng):
    angles = angles_of(rng, ROWS, PAIRS)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x = jnp.asarray(rng.standard_normal((BATCH, TOKENS, HEADS, D)), "float32")
    options = dict(POSITIONS[case])
    given = options.pop("positions", None)
    exact_given = np.array(given) if isinstance(given, list) else given
    with jax.enable_x64(dtype == "int64"):
        rows = np.array(given, dtype) if isinstance(given, list) else given
        if is_traced and given is not None:
            result = jax.jit(lambda x, p: apply_rotary(x, (cos, sin), positions=p, **options))(
                x, rows
            )
        else:
            result = jax.jit(lambda x: apply_rotary(x, (cos, sin), positions=rows, **options))(x)
        assert_right(result, x, cos, sin, "float32", positions=exact_given, **options)


def test_constants_of_numpy_and_pytorch_keep_their_64_bits(rng):
    torch = pytest.importorskip("torch")
    angles = angles_of(rng, ROWS, PAIRS)
    cos, sin = np.cos(angles), np.sin(angles)
    x = jnp.asarray(rng.standard_normal((BATCH, TOKENS, HEADS, D)), "float32")
    exact = rotate(to_float64(x), cos, sin, positions=np.array([2**40, 1, 2, 3, -(2**40)]))
    rows = np.array([2**40, 1, 2, 3, -(2**40)])  # of 32 bits: 0 and 0
    tables = [
        (cos, sin),
        (torch.from_numpy(cos), torch.from_numpy(sin)),
        RotaryTable.from_complex(cos + 1j * sin),
    ]
    for table in tables:
        run = partial(apply_rotary, table=table, positions=rows, interleaved=False)
        result = jax.jit(run)(x)
        check(to_float64(result), exact, "float32")
        assert not jax.config.jax_enable_x64


def test_a_bfloat16_table_of_pytorch_stays_one_under_eager_rounding(rng):
    torch = pytest.importorskip("torch")
    angles = angles_of(rng, ROWS, PAIRS)
    cos, sin = (torch.from_numpy(f(angles)).bfloat16() for f in (np.cos, np.sin))
    own = [jnp.asarray(part.float().numpy(), "bfloat16") for part in (cos, sin)]
    x = jnp.asarray(rng.standard_normal((BATCH, TOKENS, HEADS, D)), "bfloat16")
    result = jax.jit(lambda x: apply_rotary(x, (cos, sin), rounding="eager"))(x)
    assert_same(result, apply_rotary(x, (*own,), rounding="eager"))
    wide = [part.astype("float32") for part in own]
    assert np.any(to_bits(result) != to_bits(apply_rotary(x, (*wide,), rounding="eager")))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_constants_of_every_library_and_dtype_are_those_of_eager_calls(library, dtype, rng, device):
    """Under eager rounding a table of another dtype gives other bits."""
    torch = pytest.importorskip("torch")
    if device.platform == "gpu":
        pytest.skip("eager calls on a GPU take no arrays of the CPU")
    if library == "numpy" and dtype == "bfloat16":
        pytest.skip("no dtype of NumPy")
    q, k, q_weight, k_weight, cos, sin = of_norms(rng, "heads", "float32")
    rows, offsets = rng.integers(0, 4, (2, TOKENS)), rng.integers(0, 4, 2)
    torches = [torch.from_numpy(np.array(each)) for each in (cos, sin, q_weight, k_weight)]
    floats = [each.to(getattr(torch, dtype)) for each in torches]
    ints = [torch.from_numpy(rows), torch.from_numpy(offsets.astype("int32"))]
    if library == "numpy":
        floats, ints = ([each.numpy() for each in some] for some in (floats, ints))

    def run(q, k):
        table, (positions, lengths) = tuple(floats[:2]), ints
        eagerly = {"rounding": "eager"}
        return (
            apply_rotary_qk(q, k, table, positions=positions, **eagerly),
            apply_rotary_qk(q, k, table, seqlen_offsets=lengths, **eagerly),
            apply_qk_norm_rotary(q, k, floats[2], floats[3], table),
        )

    assert_same(jax.jit(run)(q, k), run(q, k))

    def loss(q, k):
        return sum((each**2).sum() for each in run(q, k)[2])

    wide = [jnp.asarray(np.asarray(torch.as_tensor(each).float())) for each in floats]

    def plain(q, k):
        of_norm = apply_qk_norm_rotary(q, k, wide[2], wide[3], (wide[0], wide[1]))
        return sum((each**2).sum() for each in of_norm)

    found, exact = (jax.jit(jax.grad(each, (0, 1)))(q, k) for each in (loss, plain))
    for one, other in zip(found, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precompute", [True, False])
def test_a_table_is_computed_like_what_is_traced(precompute, rng):
    x = jnp.asarray(rng.standard_normal((BATCH, TOKENS, HEADS, D)), "float32")
    sizes = (16,) if precompute else ()

    def run(x):
        made = RotaryTable.from_inverse_frequencies(
            [1.0, 0.1, 0.01], *sizes, like=x, precompute=precompute
        )
        return apply_rotary(x, made, positions=7)

    assert_same(jax.jit(run)(x), run(x))


@pytest.mark.parametrize("name", ["positions", "seqlen_offsets"])
def test_an_int_that_is_traced_is_one_of_a_cache(name, rng):
    angles = angles_of(rng, ROWS, PAIRS)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x = jnp.asarray(rng.standard_normal((BATCH, TOKENS, HEADS, D)), "float32")
    run = jax.jit(lambda x, start: apply_rotary(x, (cos, sin), **{name: start}))
    for start in (0, 3):
        assert_same(run(x, start), apply_rotary(x, (cos, sin), positions=start))
    behind = np.asarray(run(x, ROWS - 1))  # where the int of an eager call is refused
    assert np.isnan(behind[:, 1:, :, :8]).all() and np.isfinite(behind[:, 0]).all()


def test_an_int_of_jax_that_a_program_closes_over_is_one_number(rng):
    q, *_, cos, sin = of_norms(rng, "heads", "float32")
    number = jnp.int32(2)
    found = jax.jit(lambda q: apply_rotary(q, (cos, sin), positions=number))(q)
    assert_same(found, apply_rotary(q, (cos, sin), positions=2))
    with pytest.raises(ValueError, match=r"got \(\): one number for all must be an int"):
        apply_rotary(q, (cos, sin), positions=number)


def test_a_table_is_no_argument_of_a_program(rng):
    q, *_, cos, sin = of_norms(rng, "heads", "float32")
    with pytest.raises(TypeError, match="make a RotaryTable within the function that is traced"):
        jax.jit(apply_rotary)(q, RotaryTable(cos, sin))


def test_packed_sequences_are_counted(rng):
    angles = angles_of(rng, ROWS, PAIRS)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x = jnp.asarray(rng.standard_normal((TOKENS, HEADS, D)), "float32")
    starts, offsets = jnp.array([0, 2, 4]), jnp.array([3, 5])
    run = partial(apply_rotary, x, (cos, sin))
    result = jax.jit(lambda c, o: run(cu_seqlens=c, seqlen_offsets=o))(starts, offsets)
    places = np.array([[3, 4, 5, 6, -1]])
    assert_right(result, x, cos, sin, "float32", layout="thd", positions=places)


def test_k_may_have_a_table_and_tokens_of_its_own(rng):
    angles = angles_of(rng, ROWS, PAIRS)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    q = jnp.asarray(rng.standard_normal((BATCH, TOKENS, HEADS, D)), "float32")
    k = jnp.asarray(rng.standard_normal((BATCH, 3, KV_HEADS, D)), "float32")
    run = partial(apply_rotary_qk, k_positions=4)
    results = jax.jit(lambda q, k, c, s: run(q, k, (c, s), k_table=(s, c)))(q, k, cos, sin)
    assert_right(results[0], q, cos, sin, "float32")
    assert_right(results[1], k, sin, cos, "float32", positions=4)
    assert_same(results, run(q, k, (cos, sin), k_table=(sin, cos)))
    with pytest.raises(ValueError, match="k: table must hold the positions"):
        jax.jit(lambda q, k: apply_rotary_qk(q, k, (cos, sin), k_positions=8))(q, k)


NORMS = {
    "heads": {},
    "an offset": {"weight_offset": 1.0, "eps": 1e-3},
    "all heads": {"norm": "heads"},
    "layer": {"norm": "layer"},
    "after": {"norm_after": True},
    "layer, after": {"norm": "layer", "norm_after": True},
    "rounded": {"round_norm": True},
}


def of_norms(rng, case, dtype):
    """q, k, their weights and a table."""
    q, k = (
        jnp.asarray(rng.standard_normal((BATCH, TOKENS, heads, D)), dtype)
        for heads in (HEADS, KV_HEADS)
    )
    of_token = NORMS[case].get("norm") == "heads"
    sizes = [heads * D if of_token else D for heads in (HEADS, KV_HEADS)]
    weights = [jnp.asarray(rng.standard_normal(size), dtype) for size in sizes]
    angles = angles_of(rng, ROWS, PAIRS)
    return q, k, *weights, jnp.cos(angles), jnp.sin(angles)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", NORMS)
def test_norms_are_those_of_eager_calls(case, dtype, rng):
    given = of_norms(rng, case, dtype)

    def run(q, k, q_weight, k_weight, cos, sin):
        both = apply_qk_norm_rotary(q, k, q_weight, k_weight, (cos, sin), **NORMS[case])
        one = apply_norm_rotary(q, q_weight, (cos, sin), positions=1, **NORMS[case])
        return both, one

    assert_same(jax.jit(run)(*given), run(*given))


def test_packed_qkv_is_rotated_and_normalised(rng):
    qkv = jnp.asarray(rng.standard_normal((BATCH, TOKENS, HEADS + 2 * KV_HEADS, D)), "float32")
    *_, cos, sin = of_norms(rng, "heads", "float32")
    run = partial(apply_rotary_qkv, table=(cos, sin), num_heads=HEADS, num_kv_heads=KV_HEADS)
    assert_same(jax.jit(run)(qkv), run(qkv))
    gradient = jax.jit(jax.grad(lambda qkv: (run(qkv) ** 2).sum() / 2))(qkv)
    np.testing.assert_allclose(gradient, qkv, atol=1e-5)  # a rotation keeps lengths


def test_calls_without_elements_are_done(rng):
    *_, cos, sin = of_norms(rng, "heads", "float32")
    for shape in ((0, TOKENS, HEADS, D), (BATCH, 0, HEADS, D)):
        assert jax.jit(apply_rotary)(jnp.ones(shape), (cos, sin)).shape == shape


# Transforms.


def numerical_gradient(function, arrays, step=1e-6):
    """The gradient of a sum of float64 by central differences, one element after the other."""
    found = []
    for i, array in enumerate(arrays):
        values, gradient = np.array(array), np.zeros(array.shape)
        for place in np.ndindex(*array.shape):
            ends = []
            for sign in (step, -step):
                moved = values.copy()
                moved[place] += sign
                ends.append(float(function(*arrays[:i], moved, *arrays[i + 1 :])))
            gradient[place] = (ends[0] - ends[1]) / (2 * step)
        found.append(gradient)
    return found


GRADIENTS = {
    "plain": {},
    "partial": {"rotary_offset": 2, "interleaved": True},
    "conjugate": {"conjugate": True, "positions": 1},
    "kept": {"positions": [[1, -1, 0]], "out_of_range": "keep"},
}


@pytest.mark.parametrize("form", ["two", "elementwise", "matrices"])
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_are_those_of_finite_differences(case, form, rng):
    with jax.enable_x64(True):
        cos, sin = jnp.asarray(rng.standard_normal((2, 5, 2)))  # no rotation: not its own inverse
        q = jnp.asarray(rng.standard_normal((1, 3, 2, 6)))
        k = jnp.asarray(rng.standard_normal((1, 3, 1, 6)))
        options = dict(GRADIENTS[case])
        if isinstance(options.get("positions"), list):
            options["positions"] = jnp.array(options["positions"])
        table = FORMS[form](cos, sin)

        @jax.jit
        def loss(q, k):
            q, k = apply_rotary_qk(q, k, table, **options)
            return (q**3).sum() + (k**3).sum()

        wanted = numerical_gradient(loss, (q, k))
        for transformed in (
            jax.grad(loss, argnums=(0, 1)),
            jax.jit(jax.grad(loss, argnums=(0, 1))),
            lambda *given: jax.value_and_grad(loss, argnums=(0, 1))(*given)[1],
            jax.grad(jax.checkpoint(loss), argnums=(0, 1)),
        ):
            for found, exact in zip(transformed(q, k), wanted, strict=True):
                np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in NORMS if case != "rounded"])
def test_gradients_of_norms_are_those_of_finite_differences(case, rng):
    with jax.enable_x64(True):
        q, k = (jnp.asarray(rng.standard_normal((1, 2, heads, 4))) for heads in (2, 1))
        of_token = NORMS[case].get("norm") == "heads"
        weights = [jnp.asarray(rng.standard_normal(4 * (n if of_token else 1))) for n in (2, 1)]
        angles = angles_of(rng, 2, 2)
        table = jnp.cos(angles), jnp.sin(angles)

        @jax.jit
        def loss(*given):
            q, k = apply_qk_norm_rotary(*given, table, **NORMS[case])
            return (q**3).sum() + (k**3).sum()

        given = q, k, *weights
        found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*given)
        for own, exact in zip(found, numerical_gradient(loss, given), strict=True):
            np.testing.assert_allclose(own, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [{}, {"norm": "layer"}, {"norm_after": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_pytorchs(dtype, norm, rng):
    torch = pytest.importorskip("torch")
    given = of_norms(rng, "heads", dtype)
    options = norm | {"positions": 2}

    def run(q, k, q_weight, k_weight, cos, sin):
        return apply_qk_norm_rotary(q, k, q_weight, k_weight, (cos, sin), **options)

    def loss(*given):
        return sum((each.astype("float32") ** 3).sum() for each in run(*given))

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*given)
    own = [torch.tensor(to_float64(each)).to(getattr(torch, str(each.dtype))) for each in given]
    for each in own[:4]:
        each.requires_grad_()
    sum((each.float() ** 3).sum() for each in run(*own)).backward()
    tolerance = 1e-5 if dtype == "float32" else 2**-6
    for mine, theirs in zip(found, own[:4], strict=True):
        assert str(mine.dtype) == dtype
        wanted = theirs.grad.double().numpy()
        off = np.abs(to_float64(mine) - wanted).max()
        assert off <= tolerance * np.abs(wanted).max()


def test_second_gradients_are_those_of_finite_differences(rng):
    with jax.enable_x64(True):
        x, weight = jnp.asarray(rng.standard_normal((2, 1, 4))), jnp.asarray(rng.standard_normal(4))
        angles = angles_of(rng, 2, 2)
        table = jnp.cos(angles), jnp.sin(angles)

        def loss(x, weight):
            return (apply_norm_rotary(x, weight, table) ** 3).sum()

        def of_gradient(x, weight):
            return (jax.grad(loss)(x, weight) ** 2).sum()

        found = jax.jit(jax.grad(of_gradient, argnums=(0, 1)))(x, weight)
        wanted = numerical_gradient(jax.jit(of_gradient), (x, weight))
        for own, exact in zip(found, wanted, strict=True):
            np.testing.assert_allclose(own, exact, rtol=1e-5, atol=1e-6)


def test_tables_and_positions_have_a_gradient_of_zeros(rng):
    q, *_, cos, sin = of_norms(rng, "heads", "float32")
    rows = jnp.arange(TOKENS)

    def loss(q, cos, sin, rows):
        return apply_rotary(q, (cos, sin), positions=rows).sum()

    of_cos, of_sin, of_rows = jax.grad(loss, argnums=(1, 2, 3), allow_int=True)(q, cos, sin, rows)
    assert not np.any(of_cos) and not np.any(of_sin)
    assert of_rows.dtype == jax.dtypes.float0


def test_forward_mode_is_refused(rng):
    q, *_, cos, sin = of_norms(rng, "heads", "float32")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: apply_rotary(q, (cos, sin)), (q,), (q,))


def test_vmap_is_one_call_after_the_other(rng):
    q, k, *_, cos, sin = of_norms(rng, "heads", "float32")
    rows = jnp.array([[0, 1, 2, 3, 4], [8, 0, 20, 1, 2]])
    run = jax.vmap(lambda q, k, rows: apply_rotary_qk(q, k, (cos, sin), positions=rows))
    wanted = apply_rotary_qk(q, k, (cos, sin), positions=rows)
    assert_same(run(q, k, rows), wanted)
    assert_same(jax.jit(run)(q, k, rows), wanted)

    def loss(q):
        return (apply_rotary(q, (cos, sin)) ** 2).sum() / 2

    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(loss)))(q), q, atol=1e-5)


def test_a_scan_over_layers_rotates_in_each_of_them(rng):
    q, *_, cos, sin = of_norms(rng, "heads", "float32")

    def layers(q):
        return jax.lax.scan(lambda x, _: (apply_rotary(x, (cos, sin)), None), q, None, length=3)[0]

    wanted = q
    for _ in range(3):
        wanted = apply_rotary(wanted, (cos, sin))
    assert_same(jax.jit(layers)(q), wanted)
    back = jax.jit(jax.grad(lambda q: (layers(q) ** 2).sum() / 2))(q)
    np.testing.assert_allclose(back, q, atol=1e-5)


def test_a_donated_array_is_rotated(rng):
    q, *_, cos, sin = of_norms(rng, "heads", "float32")
    wanted, given = apply_rotary(q, (cos, sin)), q + 0
    run = jax.jit(lambda x: apply_rotary(x, (cos, sin)), donate_argnums=0)
    assert_same(run(given), wanted)


# Refusals: those of eager calls, when a program is traced.


def refusal(function, *arguments):
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*arguments)
    return type(caught.value), str(caught.value)


MISTAKES = {
    "a short table": lambda q, k, t: apply_rotary(q, t, positions=5),
    "other shapes": lambda q, k, t: apply_rotary_qk(q, k[:, :2], t),
    "other dtypes": lambda q, k, t: apply_rotary_qk(q, k.astype("bfloat16"), t),
    "no floats": lambda q, k, t: apply_rotary(q.astype("int32"), t),
    "no table": lambda q, k, t: apply_rotary(q, t[:1]),
    "a layout": lambda q, k, t: apply_rotary(q, t, layout="hd"),
    "positions": lambda q, k, t: apply_rotary(q, t, positions=np.zeros(3, "int32")),
    "float positions": lambda q, k, t: apply_rotary(q, t, positions=k[0, :, 0, 0]),
    "a wide table": lambda q, k, t: apply_rotary(q[..., :4], t),
    "out": lambda q, k, t: apply_rotary(q, t, out=q),
    "outs": lambda q, k, t: apply_rotary_qk(q, k, t, k_positions=1, out=(q, k)),
    "weights": lambda q, k, t: apply_qk_norm_rotary(q, k, q[0, 0, 0, :3], q[0, 0, 0], t),
    "no weights": lambda q, k, t: apply_qk_norm_rotary(q, k, 3.0, q[0, 0, 0], t),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_have_the_messages_of_eager_calls(case, rng):
    q, k, *_, cos, sin = of_norms(rng, "heads", "float32")
    function = MISTAKES[case]
    eager = refusal(function, q, k, (cos, sin))
    assert refusal(jax.jit(function), q, k, (cos, sin)) == eager


def test_a_numpy_array_is_not_rotated_in_a_program(rng):
    *_, cos, sin = of_norms(rng, "heads", "float32")
    wanted = r"^x must be an array of JAX, which traces other arguments of the call, got ndarray"
    with pytest.raises(TypeError, match=wanted):
        jax.jit(lambda rows: apply_rotary(np.ones((5, 1, 8), "f"), (cos, sin), positions=rows))(
            jnp.arange(5)
        )


def test_caches_are_refused(rng):
    q, k, *_, cos, sin = of_norms(rng, "heads", "float32")
    q, k = q[0], k[0]
    caches = jnp.zeros((8, 4, KV_HEADS, D))

    def run(q, k, caches):
        slots = jnp.arange(TOKENS)
        return apply_rotary_kv_cache(q, k, k, caches, caches, (cos, sin), slot_mapping=slots)

    wanted = r"^q must be an array in memory, because caches are written in place, .*Tracer"
    with pytest.raises(TypeError, match=wanted):
        jax.jit(run)(q, k, caches)
    with pytest.raises(TypeError, match=wanted.replace("q", "k_cache", 1)):
        jax.jit(partial(run, np.asarray(q), np.asarray(k)))(caches)


def test_joined_streams_are_refused(rng):
    q, k, *_, cos, sin = of_norms(rng, "heads", "float32")
    wanted = r"^q must be an array in memory, as within jax\.pure_callback, because .*Tracer"
    with pytest.raises(TypeError, match=wanted):
        jax.jit(lambda q, k: join_qkv([rope_cupy.Stream(q, k, k, (cos, sin))]))(q, k)


class NoTextError(Exception):
    def __repr__(self):
        raise RuntimeError("no text")


FAILURES = {
    "a mistake": (ValueError("x must be better, got worse"), r"INVALID_ARGUMENT.*got worse"),
    "a surrogate": (TypeError("\ud800 is no letter"), r"INVALID_ARGUMENT.*\? is no letter"),
    "of the machine": (RuntimeError("no memory"), r"INTERNAL.*RuntimeError\('no memory'\)"),
    "an interrupt": (KeyboardInterrupt(), r"INTERNAL.*KeyboardInterrupt"),
    "an exit": (SystemExit(3), r"INTERNAL.*SystemExit"),
    "no text": (NoTextError(), r"INTERNAL.*NoTextError"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_in_a_running_program_is_an_error_of_jax(case, rng, monkeypatch):
    from rope_cupy.ways import jax_ffi

    failure, wanted = FAILURES[case]

    def fail(call):
        raise failure

    q, *_, cos, sin = of_norms(rng, "heads", "float32")
    run = jax.jit(lambda q: apply_rotary(q, (cos, sin), positions=3))
    with monkeypatch.context() as patched:
        patched.setattr(jax_ffi, "_known", {})
        patched.setattr(jax_ffi.eager, "rotate", fail)
        with pytest.raises(jax.errors.JaxRuntimeError, match=wanted):
            jax.block_until_ready(run(q))
    assert_same(run(q), apply_rotary(q, (cos, sin), positions=3))


def test_an_unknown_version_of_xla_is_told_with_the_way_out(rng, monkeypatch):
    from rope_cupy.ways import jax as way

    q, *_, cos, sin = of_norms(rng, "heads", "float32")
    monkeypatch.setattr(way, "register", lambda: "version 7.1 of XLA's FFI is not known")
    with pytest.raises(TypeError, match=r"^x must be .*jax\.pure_callback.*version 7\.1.*Tracer"):
        jax.jit(lambda q: apply_rotary(q, (cos, sin)))(q)


class PosingCuPy:
    """What is asked of CuPy, on a device of which the memory is the host's."""

    def __init__(self):
        self.entered = []
        self.cuda = self.runtime = self.Stream = self

    def pointerGetAttributes(self, pointer):  # noqa: N802
        assert pointer
        return SimpleNamespace(device=3)

    def UnownedMemory(self, pointer, size, owner, device):  # noqa: N802
        assert device == 3
        return pointer, size

    def MemoryPointer(self, memory, offset):  # noqa: N802
        return memory

    def ndarray(self, shape, dtype, memory):
        from rope_cupy.ways import jax_ffi

        assert memory[1] == np.zeros(shape, dtype).nbytes
        return jax_ffi._on_cpu(memory[0], dtype, shape)

    @contextmanager
    def Device(self, number):  # noqa: N802
        self.entered.append(("device", number))
        yield
        self.entered.pop()

    @contextmanager
    def from_external(self, stream):
        version, handle = stream.__cuda_stream__()
        assert version == 0
        self.entered.append(("stream", handle))
        yield
        self.entered.pop()


def test_a_call_on_a_gpu_is_launched_on_the_device_and_stream_of_xla(rng, monkeypatch, device):
    from rope_cupy.ways import jax_ffi

    if device.platform == "gpu":
        pytest.skip("a GPU poses as none")
    q, k, *_, cos, sin = of_norms(rng, "heads", "bfloat16")
    own, called = PosingCuPy(), []
    rotate_plainly, handle_plainly = jax_ffi.eager.rotate, jax_ffi._rotate

    def rotate_there(call):
        called.append([*own.entered])
        return rotate_plainly(call)

    run = jax.jit(lambda q, k: apply_rotary_qk(q, k, (cos, sin), positions=np.arange(TOKENS)))
    empty = jax.jit(lambda q: apply_rotary(q[:0], (cos, sin)))
    with monkeypatch.context() as patched:
        patched.setattr(jax_ffi, "_known", {})
        patched.setattr(jax_ffi, "cupy", lambda: own)
        patched.setattr(jax_ffi, "_rotate", lambda _, frame: handle_plainly("CUDA", frame))
        patched.setattr(jax_ffi.eager, "rotate", rotate_there)
        with pytest.raises(jax.errors.JaxRuntimeError, match="XLA must have a stream"):
            jax.block_until_ready(run(q, k))  # XLA has none on the CPU
        patched.setattr(jax_ffi, "_stream", lambda frame: 77)
        results = jax.block_until_ready(run(q, k))
        assert jax.block_until_ready(empty(q)).shape == (0, *q.shape[1:])
        again = jax.block_until_ready(run(q * 2, k))  # found by its shapes
    assert called == [[("device", 3), ("stream", 77)]] and not own.entered
    assert_same(results, run(q, k))
    assert_same(again, run(q * 2, k))


def test_a_program_that_has_run_is_found_by_all_but_addresses(rng, monkeypatch):
    from rope_cupy.ways import jax_ffi

    q, k, *_, cos, sin = of_norms(rng, "heads", "float32")
    rotated, plain = [], jax_ffi.eager.rotate
    monkeypatch.setattr(jax_ffi.eager, "rotate", lambda call: rotated.append(0) or plain(call))
    monkeypatch.setattr(jax_ffi, "_known", {})

    @jax.jit
    def run(x, cos, sin, first):
        rows = first + jnp.arange(x.shape[1])
        here = apply_rotary(x, (cos, sin), positions=rows, out_of_range="keep")
        return here, apply_rotary(x, (cos, sin), positions=2, interleaved=True)

    calls = [(q, cos, sin, 0), (q * 3, cos, sin, 2), (q, sin, cos, -1), (k, cos, sin, 0)]
    calls += [(x.astype("bfloat16"), *others) for x, *others in calls]
    for x, *given, first in calls * 2:
        options = {"positions": first + jnp.arange(x.shape[1]), "out_of_range": "keep"}
        found, before = run(x, *given, first), len(rotated)
        assert_same(found[0], apply_rotary(x, (*given,), **options))
        assert_same(found[1], apply_rotary(x, (*given,), positions=2, interleaved=True))
        del rotated[before:]  # by eager calls
    assert len(rotated) <= 2 * 4 < 2 * len(calls)  # by q and k, of two dtypes


# The structures of XLA's FFI.


def registered(major, minor, size):
    """What XLA gets for the frame by which it asks for the version: an error or None, the rest."""
    from rope_cupy.ways import jax_ffi

    errors = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(jax_ffi._ErrorArguments))
    def create(arguments):
        errors.append((arguments[0].code, arguments[0].message.decode()))
        return 64  # what stands for an error

    api = jax_ffi._Api(struct_size=ctypes.sizeof(jax_ffi._Api))
    api.error_create = ctypes.cast(create, ctypes.c_void_p)
    api.version.major, api.version.minor = major, minor
    metadata = jax_ffi._Metadata(struct_size=ctypes.sizeof(jax_ffi._Metadata), traits=7)
    base = jax_ffi._Extension(ctypes.sizeof(jax_ffi._Extension), jax_ffi.METADATA, None)
    extension = jax_ffi._MetadataExtension(base, ctypes.pointer(metadata))
    frame = jax_ffi._Frame(struct_size=size, api=ctypes.pointer(api))
    frame.extension = ctypes.pointer(extension.base)
    returned = jax_ffi._handlers["CUDA"](ctypes.pointer(frame))
    assert returned == (64 if errors else None)
    return errors, metadata


def test_a_known_version_is_reported_and_no_command_buffer_is_promised():
    from rope_cupy.ways import jax_ffi

    errors, metadata = registered(0, 9, ctypes.sizeof(jax_ffi._Frame) + 8)
    assert not errors
    assert (metadata.version.major, metadata.version.minor, metadata.traits) == (0, 9, 0)


@pytest.mark.parametrize(
    ("major", "size", "wanted"), [(1, 168, "version 1.9"), (0, 40, "structure _Frame of 40 bytes")]
)
def test_structures_of_another_shape_are_refused_when_jax_registers(major, size, wanted):
    from rope_cupy.ways import jax_ffi

    known = len(jax_ffi._refused)
    try:
        ((code, message),), metadata = registered(major, 9, size)
        assert code == jax_ffi.INTERNAL and wanted in message and metadata.traits == 7
        assert len(jax_ffi._refused) == known + 1 and wanted in jax_ffi._refused[known]
    finally:
        del jax_ffi._refused[known:]


STRUCTURES = {  # by their names in XLA's header, with the fields that have other names there
    "InternalExtension": ("_Extension", {}),
    "Api_Version": ("_Version", {"major": "major_version", "minor": "minor_version"}),
    "Metadata": ("_Metadata", {"version": "api_version"}),
    "Metadata_Extension": ("_MetadataExtension", {"base": "extension_base"}),
    "Api": (
        "_Api",
        {
            "version": "api_version",
            "internal": "internal_api",
            "error_create": "XLA_FFI_Error_Create",
            "error_details": "XLA_FFI_Error_GetDetails",
            "error_destroy": "XLA_FFI_Error_Destroy",
            "handler_register": "XLA_FFI_Handler_Register",
            "stream_get": "XLA_FFI_Stream_Get",
        },
    ),
    "Args": ("_Buffers", {"items": "args"}),
    "Rets": ("_Buffers", {"items": "rets"}),
    "Attrs": ("_Attributes", {"items": "attrs"}),
    "CallFrame": (
        "_Frame",
        {"context": "ctx", "arguments": "args", "results": "rets", "attributes": "attrs"},
    ),
    "Buffer": ("_Buffer", {}),
    "ByteSpan": ("_Text", {"start": "ptr", "size": "len"}),
    "Error_Create_Args": ("_ErrorArguments", {"code": "errc"}),
    "Stream_Get_Args": ("_StreamArguments", {"context": "ctx"}),
}
CONSTANTS = {
    "API_MAJOR": "MAJOR",
    "Extension_Metadata": "METADATA",
    "AttrType_STRING": "STRING",
    "Error_Code_INVALID_ARGUMENT": "INVALID_ARGUMENT",
    "Error_Code_INTERNAL": "INTERNAL",
}
BEFORE_0_11 = {"InternalExtension": "Extension_Base", "Error_GetDetails": "Error_GetMessage"}
TYPES = {"b": "PRED", "i": "S", "u": "U", "f": "F", "c": "C"}  # by NumPy's kinds of dtypes


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_structures_are_laid_out_as_in_the_header_of_xla(tmp_path):
    from rope_cupy.ways import jax_ffi

    known = {}
    for c_name, (name, renamed) in STRUCTURES.items():
        kind = getattr(jax_ffi, name)
        for field, _ in kind._fields_:
            c_field = {"extension": "extension_start", **renamed}.get(field, field)
            part = getattr(kind, field)
            known[f"offsetof(XLA_FFI_{c_name}, {c_field})"] = part.offset
            known[f"sizeof(XLA_FFI_{c_name}::{c_field})"] = part.size
    for c_name, name in CONSTANTS.items():
        known[f"XLA_FFI_{c_name}"] = getattr(jax_ffi, name)
    for number, dtype in jax_ffi.DTYPES.items():
        plain = TYPES.get(dtype.kind, "") + str(8 * dtype.itemsize)
        c_name = {"bool": "PRED", "bfloat16": "BF16"}.get(dtype.name, plain)
        known[f"XLA_FFI_DataType_{c_name}"] = number
    lines = [f'static_assert({what} == {value}, "");' for what, value in known.items()]
    source, folder = tmp_path / "layout.cc", jax.ffi.include_dir()
    header = Path(folder, "xla/ffi/api/c_api.h").read_text()

    def compiled(lines):
        text = "\n".join(["#include <cstddef>", '#include "xla/ffi/api/c_api.h"', *lines, ""])
        for name, older in BEFORE_0_11.items():
            text = text if f"XLA_FFI_{name}" in header else text.replace(name, older)
        source.write_text(text)
        command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{folder}", str(source)]
        return subprocess.run(command, capture_output=True, text=True)

    done = compiled(lines)
    assert done.returncode == 0, done.stderr[-3000:]
    at = lines.index(next(line for line in lines if "CallFrame, attrs" in line))
    lines[at] = lines[at].replace(" == ", " == 8 + ")
    assert "static assertion failed" in compiled(lines).stderr


# Threads, memory and the end of a process.


def test_threads_run_programs_at_the_same_time(rng, device):
    q, k, *_, cos, sin = of_norms(rng, "heads", "float32")
    run = jax.jit(lambda q, k, p: apply_rotary_qk(q, k, (cos, sin), positions=p))
    wanted = [apply_rotary_qk(q, k, (cos, sin), positions=start) for start in range(4)]

    def many(start):
        with jax.default_device(device):
            own = jax.jit(lambda q: apply_rotary(q, (cos, sin), positions=start))  # traced here
            return own(q), [run(q, k, start) for _ in range(50)]

    with ThreadPoolExecutor(4) as threads:
        for exact, (one, both) in zip(wanted, threads.map(many, range(4)), strict=True):
            assert_same(one, exact[0])
            for results in both:
                assert_same(results, exact)


def test_a_program_that_runs_often_keeps_nothing(rng):
    q, k, *_, cos, sin = of_norms(rng, "heads", "float32")
    rows = np.arange(TOKENS)
    run = jax.jit(lambda q, k: apply_rotary_qk(q, k, (cos, sin), positions=rows))

    def times(number):
        for _ in repeat(None, number):
            q_out, _ = run(q, k)
        q_out.block_until_ready()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = times(100)
        assert times(1000) - before < 16 * 1000  # less than an object of Python for each
    finally:
        tracemalloc.stop()


def test_programs_of_many_shapes_free_their_constants(rng):
    from rope_cupy.ways import jax_ffi

    angles = angles_of(rng, 200, PAIRS)

    def trace(tokens):
        table = np.cos(angles), np.sin(angles)  # constants of 64 bits, which are copied
        x = jnp.ones((tokens, 1, D))
        program = jax.jit(lambda x: apply_rotary(x, table, positions=np.arange(tokens)))
        assert program(x).shape == x.shape

    trace(1)
    before = len(jax.live_arrays())
    for tokens in range(1, 101):
        trace(tokens)
    jax.clear_caches()
    gc.collect()
    assert len(jax.live_arrays()) <= before
    known = jax_ffi._program_of.cache_info()
    assert known.currsize <= known.maxsize == 256


def test_a_program_keeps_its_constants(rng):
    angles = angles_of(rng, ROWS, PAIRS)
    cos, sin = np.cos(angles), np.sin(angles)
    x = jnp.asarray(rng.standard_normal((BATCH, TOKENS, HEADS, D)), "float32")
    exact = rotate(to_float64(x), cos, sin)
    run = jax.jit(lambda x, table=(cos, sin): apply_rotary(x, table)).lower(x).compile()
    cos[:], sin[:] = 7, 7
    del cos, sin, angles
    gc.collect()
    check(to_float64(run(x)), exact, "float32")


def test_an_exported_program_is_run_where_the_target_is_let_pass(rng):
    from jax import export

    q, *_, cos, sin = of_norms(rng, "heads", "float32")
    run = jax.jit(lambda q: apply_rotary(q, (cos, sin)))
    with pytest.raises(ValueError, match="custom calls whose targets have no compatib"):
        export.export(run)(q)
    passes = [export.DisabledSafetyCheck.custom_call("rope_cupy_rotate")]
    assert_same(export.export(run, disabled_checks=passes)(q).call(q), run(q))
    (symbolic,) = export.symbolic_shape("t")
    with pytest.raises(TypeError, match=r"^x must have a shape of ints, not of symbols, got \(t,"):
        export.export(run, disabled_checks=passes)(
            jax.ShapeDtypeStruct((symbolic, HEADS, D), "float32")
        )


AT_THE_END = """
import jax, jax.numpy as jnp, rope_cupy
cos = sin = jnp.ones((64, 32))
@jax.jit
def run(q, square):
    q = q + (square @ square @ square).sum()  # which takes longer than QUIET_SECONDS
    return jax.lax.fori_loop(0, 100, lambda _, q: rope_cupy.apply_rotary(q, (cos, sin)), q)
q, square = jnp.ones((1, 64, 8, 64)), jnp.ones((2500, 2500))
run(q, square).block_until_ready()
result = run(q, square)
assert not result.is_ready()
print("ends")
"""


@pytest.mark.parametrize("last", ["", "del result"])
def test_a_process_may_end_while_a_program_runs(last):
    done = in_a_process("JAX_PLATFORMS=cpu", AT_THE_END + last)
    assert (done.stdout, done.returncode) == ("ends\n", 0), done.stderr[-2000:]


def in_a_process(variable, script):
    name, _, value = variable.partition("=")
    path = [rope_cupy.__path__[0].rpartition("/")[0], *sys.path]
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), name: value},
    )


# Several devices, in a process of its own: their number is fixed when JAX begins.

OVER_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import NamedSharding, PartitionSpec as P
import rope_cupy
assert len(jax.devices()) == 2
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
q = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5, 4, 8)), "float32")
angles = np.outer(np.arange(5), [1.0, 0.3, 0.1, 0.03])
cos, sin = jnp.cos(angles), jnp.sin(angles)
wanted = rope_cupy.apply_rotary(q, (cos, sin))
run = lambda q, cos, sin: rope_cupy.apply_rotary(q, (cos, sin))
mapped = jax.shard_map(
    run, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"), check_vma=False
)
found = jax.jit(mapped)(q, cos, sin)
assert np.array_equal(found, wanted) and len(found.devices()) == 2
gradient = jax.jit(jax.grad(lambda q: (mapped(q, cos, sin) ** 2).sum() / 2))(q)
assert np.allclose(gradient, q, atol=1e-5)
second = jax.device_put(q, jax.devices()[1])
eager = rope_cupy.apply_rotary(second, (cos, sin))
assert np.array_equal(eager, wanted) and eager.devices() == second.devices()
shared = jax.device_put(q, NamedSharding(mesh, P("data")))
assert np.array_equal(jax.jit(run)(shared, cos, sin), wanted)
print("right")
"""


def test_a_program_over_several_devices_is_right(device):
    if device.platform == "gpu":
        pytest.skip("devices of the CPU can be made, those of a GPU cannot")
    script = "import os; os.environ['JAX_PLATFORMS'] = 'cpu'\n" + OVER_DEVICES
    done = in_a_process("XLA_FLAGS=--xla_force_host_platform_device_count=2", script)
    assert done.stdout == "right\n", done.stderr[-2000:]
