"""RotaryTable: every form reads the caller's memory in place and means the same angles.

On the CPU a result is computed in float64 and rounded once, so equal tables give equal bits: a form
is held against the half-width table, and that against the float64 reference.
"""

import copy
import gc
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from arrays import hold, on_every
from numpy.lib.stride_tricks import as_strided
from reference import check, decode, rotate, to_float64

import rope_cupy
from rope_cupy import RotaryTable, apply_rotary, frequencies
from rope_cupy.arrays.base import computed_by
from rope_cupy.arrays.torch import Torch
from rope_cupy.tables import source_of

WRAP = {"numpy": lambda array: array, "torch": torch.from_numpy}
B, S, H, D, PAIRS = 2, 5, 3, 10, 4  # two elements of each head pass through
RNG = np.random.default_rng(22)
SHAPES = [(7, PAIRS), (1, S, PAIRS), (B, S, PAIRS)]
SHAPES += [(1, S, H, PAIRS), (B, S, 1, PAIRS), (B, S, H, PAIRS)]


@pytest.fixture(params=WRAP)
def wrap(request):
    return WRAP[request.param]


def fresh(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def cos_sin(shape=SHAPES[0], dtype="float32"):
    angles = RNG.uniform(0, 7, shape)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def twice(half, interleaved):
    return half.repeat(2, -1) if interleaved else np.concatenate([half, half], -1)


def matrices(cos, sin):
    return np.stack([cos, -sin, sin, cos], -1).reshape(*cos.shape, 2, 2)


def as_complex(cos, sin):
    return (cos + 1j * sin).astype(np.result_type(cos.dtype, "complex64"))


# Each form: its constructor, and its arrays from half-width cosines and sines. A full width repeats
# its angles as the pairing wants.
FORMS = {
    "half": (RotaryTable, lambda cos, sin, _: (cos.copy(), sin.copy())),
    "tuple": (lambda cos, sin: (cos, sin), lambda cos, sin, _: (cos.copy(), sin.copy())),
    "full": (
        RotaryTable.from_full_width,
        lambda cos, sin, interleaved: (twice(cos, interleaved), twice(sin, interleaved)),
    ),
    "cache": (RotaryTable.from_cache, lambda cos, sin, _: (np.concatenate([cos, sin], -1),)),
    "complex": (RotaryTable.from_complex, lambda cos, sin, _: (as_complex(cos, sin),)),
    "matrices": (RotaryTable.from_matrices, lambda cos, sin, _: (matrices(cos, sin),)),
}
pairings = pytest.mark.parametrize("interleaved", [False, True])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
forms = pytest.mark.parametrize("form", FORMS)


def rotated(x, table, wrap, **options):
    return np.asarray(apply_rotary(wrap(x), table, **options))


def exact(x, cos, sin, **options):
    return rotate(*(np.asarray(array, np.float64) for array in (x, cos, sin)), **options)


@pairings
@shapes
def test_a_half_width_table_of_any_rank_rotates_as_defined(shape, interleaved, wrap):
    x, (cos, sin) = fresh(B, S, H, D), cos_sin(shape)
    y = rotated(x, RotaryTable(wrap(cos), wrap(sin)), wrap, interleaved=interleaved)
    check(np.float64(y), exact(x, cos, sin, interleaved=interleaved), "float32")


@pytest.mark.parametrize(
    ("form", "shape"),
    [(form, shape) for form in FORMS for shape in SHAPES if form != "cache" or len(shape) == 2],
    ids=str,
)
@pairings
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_form_of_one_table_gives_the_same_bits(dtype, form, shape, interleaved, wrap):
    build, arrays_of = FORMS[form]
    x, (cos, sin) = fresh(B, S, H, D), cos_sin(shape, dtype)
    expected = rotated(x, (wrap(cos), wrap(sin)), wrap, interleaved=interleaved)
    table = build(*map(wrap, arrays_of(cos, sin, interleaved)))
    assert np.array_equal(rotated(x, table, wrap, interleaved=interleaved), expected)


@forms
@pairings
def test_a_table_is_read_in_place_when_it_is_used(form, interleaved, wrap):
    build, arrays_of = FORMS[form]
    sources = arrays_of(*cos_sin(), interleaved)
    x, table = fresh(S, H, D), build(*map(wrap, sources))
    before = rotated(x, table, wrap, interleaved=interleaved)
    for source in sources:
        source *= -2  # exact in binary: the rotated part of the result changes by the same factor
    after = rotated(x, table, wrap, interleaved=interleaved)
    assert np.array_equal(after[..., : 2 * PAIRS], -2 * before[..., : 2 * PAIRS])
    assert np.array_equal(after[..., 2 * PAIRS :], x[..., 2 * PAIRS :])


@pairings
def test_a_full_width_table_is_read_at_the_first_of_each_pair(interleaved, wrap):
    x, (cos, sin) = fresh(S, H, D), cos_sin()
    full = [np.full((7, 2 * PAIRS), np.nan, np.float32) for _ in range(2)]
    for width, half in zip(full, (cos, sin), strict=True):
        width[:, slice(None, None, 2) if interleaved else slice(PAIRS)] = half
    y = rotated(x, RotaryTable.from_full_width(*map(wrap, full)), wrap, interleaved=interleaved)
    assert np.array_equal(y, rotated(x, (wrap(cos), wrap(sin)), wrap, interleaved=interleaved))


@pairings
def test_a_table_for_one_batch_and_one_head_serves_all(interleaved, wrap):
    x, (cos, sin) = fresh(B, S, H, D), cos_sin((1, S, 1, PAIRS))
    by_batch = wrap(cos[:, :, 0]), wrap(sin[:, :, 0])
    by_position = wrap(cos[0, :, 0]), wrap(sin[0, :, 0])
    expected = rotated(x, by_position, wrap, interleaved=interleaved)
    for table in ((wrap(cos), wrap(sin)), by_batch):
        assert np.array_equal(rotated(x, table, wrap, interleaved=interleaved), expected)
        alone = rotated(x[1], table, wrap, interleaved=interleaved)
        assert np.array_equal(alone, expected[1])


# Strides and dtypes.


def spread(array):
    """The same numbers at every other place along every axis, NaN between them."""
    wide = np.full([2 * size + 1 for size in array.shape], np.nan, array.dtype)
    every_other = (slice(1, None, 2),) * array.ndim
    wide[every_other] = array
    return wide[every_other]


STRIDES = {
    ("numpy", "columns first"): np.asfortranarray,
    ("torch", "columns first"): np.asfortranarray,
    ("numpy", "spread"): spread,
    ("torch", "spread"): spread,
    ("numpy", "backwards"): lambda array: np.flip(np.flip(array).copy()),
    ("numpy", "rows backwards"): lambda array: array[::-1].copy()[::-1],
}


@forms
@pairings
@pytest.mark.parametrize(("library", "strides"), STRIDES)
def test_a_table_of_any_strides_is_read_in_place(library, strides, interleaved, form):
    build, arrays_of = FORMS[form]
    wrap, lay = WRAP[library], STRIDES[library, strides]
    x, sources = fresh(S, H, D), arrays_of(*cos_sin(), interleaved)
    expected = rotated(x, build(*map(wrap, sources)), wrap, interleaved=interleaved)
    laid = [lay(source) for source in sources]
    assert all(source.strides != array.strides for source, array in zip(laid, sources, strict=True))
    for replaced in range(2 ** len(sources) - 1):  # cos and sin need not have the same strides
        mixed = [
            source if replaced >> index & 1 else array
            for index, (array, source) in enumerate(zip(laid, sources, strict=True))
        ]
        y = rotated(x, build(*map(wrap, mixed)), wrap, interleaved=interleaved)
        assert np.array_equal(y, expected)


@pytest.mark.parametrize("axis", range(4))
def test_a_table_may_repeat_itself_along_any_axis(axis, wrap):
    x, whole = fresh(B, S, H, D), SHAPES[-1]
    halves = cos_sin([1 if n == axis else size for n, size in enumerate(whole)])
    expected = exact(x, *(half.repeat(whole[axis], axis) for half in halves))
    strides = [0 if n == axis else stride for n, stride in enumerate(halves[0].strides)]
    table = RotaryTable(*(wrap(as_strided(half, whole, strides)) for half in halves))
    check(np.float64(rotated(x, table, wrap)), expected, "float32")


REAL_DTYPES = [("numpy", name) for name in ("float16", "float32", "float64")]
REAL_DTYPES += [("torch", name) for name in ("float16", "bfloat16", "float32", "float64")]


@pytest.mark.parametrize("x_dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("complex", "tuple")])
@pytest.mark.parametrize(("library", "dtype"), REAL_DTYPES)
def test_a_table_of_any_dtype_gives_the_bits_of_its_numbers(library, dtype, form, x_dtype):
    build, arrays_of = FORMS[form]
    x = fresh(S, H, D).astype(x_dtype)
    sources = [torch.from_numpy(a).to(getattr(torch, dtype)) for a in arrays_of(*cos_sin(), True)]
    doubles = [source.double().numpy() for source in sources]
    wrap = WRAP[library]
    table = build(*(source.numpy() if library == "numpy" else source for source in sources))
    assert table.dtype == dtype
    expected = rotated(x, build(*doubles), WRAP["numpy"], interleaved=True)
    y = rotated(x, table, wrap, interleaved=True)
    assert y.dtype == x_dtype
    assert np.array_equal(y, expected)


@forms
@shapes
def test_a_table_tells_its_size_dtype_and_device(shape, form, wrap):
    build, arrays_of = FORMS["half" if form == "tuple" else form]
    shape = SHAPES[0] if form == "cache" else shape
    table = build(*map(wrap, arrays_of(*cos_sin(shape), False)))
    told = (table.rotary_dim, table.num_positions, table.shape, table.dtype, table.device)
    assert told == (2 * PAIRS, shape[0] if len(shape) == 2 else shape[1], shape, "float32", "cpu")
    for word in ("RotaryTable", str(shape), "float32", "cpu"):
        assert word in repr(table)


# Memory.


@forms
def test_a_table_keeps_the_memory_that_it_reads(form, wrap):
    build, arrays_of = FORMS[form]
    x, halves = fresh(64, H, D), cos_sin((4096, PAIRS))
    expected = rotated(x, (wrap(halves[0]), wrap(halves[1])), wrap)
    table = build(*map(wrap, arrays_of(*halves, False)))
    gc.collect()
    size = 4096 * PAIRS
    churn = [np.full(count * size, np.nan, np.float32) for count in (1, 2, 4) for _ in range(32)]
    assert np.array_equal(rotated(x, table, wrap, interleaved=False), expected)
    assert all(np.isnan(block[-1]) for block in churn)


def test_a_tensor_whose_data_is_exchanged_leaves_the_table_whole():
    x, halves = torch.from_numpy(fresh(64, H, D)), cos_sin((4096, PAIRS))
    cos, sin = (torch.from_numpy(half).clone() for half in halves)
    table = RotaryTable(cos, sin)
    old = apply_rotary(x, table)
    cos.data, sin.data = -cos, -sin
    churn = [torch.full_like(cos, torch.nan) for _ in range(64)]
    y = apply_rotary(x, table)
    new = torch.cat([-old[..., : 2 * PAIRS], x[..., 2 * PAIRS :]], -1)
    assert torch.equal(y, old) or torch.equal(y, new)
    assert len(churn) == 64


def test_one_table_serves_arrays_of_every_dtype_and_shape(wrap):
    cos, sin = cos_sin()
    table = RotaryTable(wrap(cos), wrap(sin))
    for dtype in ("float16", "float32", "float64"):
        for heads in (1, H):
            x = fresh(S, heads, D).astype(dtype)
            y = rotated(x, table, wrap, positions=2)
            check(np.float64(y), exact(x[None], cos, sin, positions=2)[0], dtype)


FORM_SOURCES = {
    "half": (RotaryTable, lambda cos, sin: (cos, sin)),
    "full": (RotaryTable.from_full_width, lambda cos, sin: (np.tile(cos, 2), np.tile(sin, 2))),
    "cache": (RotaryTable.from_cache, lambda cos, sin: (np.concatenate([cos, sin], -1),)),
    "complex": (RotaryTable.from_complex, lambda cos, sin: (cos + 1j * sin,)),
}


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
@pytest.mark.parametrize("form", FORM_SOURCES)
def test_a_copy_of_a_table_outlives_the_table(form, copied):
    make, sources = FORM_SOURCES[form]
    angle = np.random.default_rng(3).uniform(-3, 3, (5, 4))
    table = make(*sources(np.cos(angle), np.sin(angle)))
    x = np.random.default_rng(4).standard_normal((5, 2, 8))
    expected = apply_rotary(x, table)
    twin = copied(table)
    if copied is not copy.copy:
        first, second = (source_of(each).view(None).pointers for each in (table, twin))
        assert first[0] != second[0]
    del table
    gc.collect()
    _ = [np.full((5, 8), np.nan) for _ in range(50)]
    assert np.array_equal(apply_rotary(x, twin), expected)
    assert repr(twin) == repr(make(*sources(np.cos(angle), np.sin(angle))))


def test_a_table_that_comes_to_require_a_gradient_is_refused_from_then_on():
    cos, sin = torch.ones(5, 4), torch.zeros(5, 4)
    table, x = RotaryTable(cos, sin), torch.ones(5, 2, 8)
    assert torch.equal(apply_rotary(x, table), x)
    sin.requires_grad_()
    with pytest.raises(ValueError, match=r"^table must not require a gradient"):
        apply_rotary(x, table)


@pytest.mark.parametrize(
    "move",
    [
        lambda cos: cos.share_memory_(),
        lambda cos: cos.resize_(400, 4),
        lambda cos: cos.untyped_storage().resize_(1 << 16),
        lambda cos: setattr(cos, "data", cos.data.clone()),
    ],
    ids=["shared", "resized", "storage resized", "data"],
)
def test_a_table_follows_a_tensor_whose_data_moves(move):
    angle = torch.rand(300, 4)
    cos, sin, x = angle.cos(), angle.sin(), torch.randn(300, 2, 8)
    table = RotaryTable(cos, sin)
    expected = apply_rotary(x, table)
    for part in (cos, sin):
        move(part)
    assert [torch.full((300, 4), torch.nan) for _ in range(8)]  # in the memory that is free now
    assert torch.equal(apply_rotary(x, table), expected)


def test_a_tensor_that_has_given_its_memory_back_is_refused():
    cos, sin = torch.ones(5, 4), torch.zeros(5, 4)
    table = RotaryTable(cos, sin)
    sin.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=r"^sin must be a tensor in memory"):
        apply_rotary(torch.ones(5, 2, 8), table)


# Tables that are computed.


@pytest.mark.parametrize("base", [256.0, 10000.0, 500000.0, 1e6, 5e6, 1e7])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_table_of_position_a_million_is_within_one_ulp(base, library):
    mpmath = pytest.importorskip("mpmath")
    position, rotary_dim = 1_000_000, 16
    like = {"numpy": np.zeros(1), "torch": torch.zeros(1)}[library]
    inv_freq = frequencies.inverse_frequencies(rotary_dim, base)
    table = RotaryTable.from_inverse_frequencies(inv_freq, position + 1, like=like)
    cos, sin = (np.asarray(part)[-1] for part in table._source.arrays)
    with mpmath.workdps(40):
        for pair in range(rotary_dim // 2):
            angle = position * mpmath.mpf(base) ** (-mpmath.mpf(2 * pair) / rotary_dim)
            for number, exact in ((cos[pair], mpmath.cos(angle)), (sin[pair], mpmath.sin(angle))):
                ulp = float(np.spacing(np.float32(abs(float(exact)))))
                assert abs(float(mpmath.mpf(float(number)) - exact)) <= ulp


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CONFIG = {"head_dim": 16, "rope_theta": 1e6, "max_position_embeddings": 256, "rope_scaling": YARN}


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_table_of_a_config_has_its_frequencies_and_its_scaling(library):
    like = {"numpy": np.zeros(1), "torch": torch.zeros(1)}[library]
    table = RotaryTable.from_config(CONFIG, 256, like=like)
    inv_freq, scaling = frequencies.from_config(CONFIG)
    assert scaling != 1
    angles = np.outer(np.arange(256.0), inv_freq)
    cos, sin = (np.asarray(part) for part in table._source.arrays)
    assert np.array_equal(cos, (scaling * np.cos(angles)).astype(np.float32))
    assert np.array_equal(sin, (scaling * np.sin(angles)).astype(np.float32))
    assert type(table._source.arrays[0]) is type(like)


def test_the_length_and_the_layers_of_a_config_are_passed_on():
    dynamic = CONFIG | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    layers = CONFIG | {"rope_scaling": {"a": {"rope_theta": 10.0}, "b": {"rope_theta": 100.0}}}
    for config, options in ((dynamic, {"seq_len": 1024}), (layers, {"layer_type": "b"})):
        inv_freq, _ = frequencies.from_config(config, **options)
        table = RotaryTable.from_config(config, 8, like=np.zeros(1), **options)
        assert np.array_equal(table._source.arrays[0][1], np.cos(inv_freq).astype(np.float32))


@pytest.mark.parametrize("strides", ["dense", "backward", "read-only", "transposed"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_angles_become_a_table_whatever_their_strides(strides, library):
    angles = np.random.default_rng(0).uniform(-9, 9, (6, 4))
    angles = {"backward": angles[::-1], "transposed": angles.T.copy().T}.get(strides, angles)
    angles.flags.writeable = strides != "read-only"
    like = {"numpy": np.zeros(1), "torch": torch.zeros(1)}[library]
    table = RotaryTable.from_angles(angles, like=like)
    cos, sin = (np.asarray(part) for part in table._source.arrays)
    assert (table.shape, table.dtype) == ((6, 4), "float32")
    assert np.array_equal(cos, np.cos(angles).astype(np.float32))
    assert np.array_equal(sin, np.sin(angles).astype(np.float32))


@on_every("numpy", "torch", "cupy", "torch-cuda")
def test_angles_of_any_library_become_a_table(library):
    angles = np.random.default_rng(0).uniform(-9, 9, (6, 4))
    for dtype in ("float64", "float32"):
        held = hold(angles, dtype, library)
        table = RotaryTable.from_angles(held.array, like=held.array)
        cos, sin = (to_float64(part) for part in table._source.arrays)
        exact = decode(held.elements, dtype)
        np.testing.assert_allclose(cos, np.cos(exact), atol=6e-8)
        np.testing.assert_allclose(sin, np.sin(exact), atol=6e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_host_does_not_wait_for_angles_on_the_gpu_of_the_table(dtype):
    angles = hold(np.array([[1.0, np.inf], [2.0, 3.0]]), dtype, "torch-cuda").array
    RotaryTable.from_angles(angles, like=angles)  # the first launches of kernels load them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not every wait is seen
        try:
            torch.cuda.set_sync_debug_mode("error")
            table = RotaryTable.from_angles(angles, like=angles)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    cos, _ = (to_float64(part) for part in table._source.arrays)
    assert np.isnan(cos[0, 1]) and np.isfinite(np.delete(cos.ravel(), 1)).all()


def test_angles_on_the_device_of_the_table_do_not_pass_through_numpy(monkeypatch):
    """The way that tensors on a GPU take, by tensors on the CPU that are said to be on one."""
    angles = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(
        rope_cupy.tables.arrays, "in_float64_beside", lambda x, like: Torch().in_float64(x)
    )
    monkeypatch.setattr(Torch, "download", lambda self, x: pytest.fail("it was read"))
    for given in (angles, angles.float()):
        table = RotaryTable.from_angles(given, like=torch.zeros(1))
        cos, sin = (part for part in table._source.arrays)
        assert cos.dtype == torch.float32 and not cos.requires_grad
        exact = given.detach().double()
        torch.testing.assert_close(cos, exact.cos().float(), rtol=0, atol=0)
        torch.testing.assert_close(sin, exact.sin().float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "angles must be an array of float64 or float32, got list", lambda: [[1.0]]),
        (TypeError, "angles must be an array of float64", lambda: np.ones((2, 2), np.float16)),
        (TypeError, "angles must be an array of float64", lambda: torch.ones(2, 2).int()),
        (ValueError, "angles must be finite", lambda: torch.full((2, 2), torch.inf)),
        (ValueError, r"cos must have the shape \(positions, pairs\)", lambda: np.ones(2)),
    ],
)
def test_angles_of_another_kind_are_refused(error, message, make):
    with pytest.raises(error, match=message):
        RotaryTable.from_angles(make(), like=np.zeros(1))


@pytest.mark.parametrize(
    ("error", "scaling", "got"),
    [(TypeError, "2", "'2'"), (TypeError, True, "True"), (ValueError, float("nan"), "nan")],
)
def test_an_attention_scaling_that_is_no_number_is_refused(error, scaling, got):
    with pytest.raises(error, match=f"attention_scaling must be .*, got {got}"):
        RotaryTable.from_inverse_frequencies([1.0], 4, like=np.zeros(1), attention_scaling=scaling)


def test_a_table_is_computed_by_numpy_where_what_cupy_compiles_cannot_be_kept():
    def fail(*_):
        raise OSError(28, "No space left on device")

    module = SimpleNamespace(asarray=lambda array: np.array(array), cos=fail)
    angles = np.ones((2, 3))
    (cos,) = computed_by(module, lambda module, angles: (module.cos(angles),), [angles])
    assert np.array_equal(cos, np.cos(angles))
