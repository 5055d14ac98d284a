"""Arrays of every library: the caller's kind comes back, they mix, none is imported uninvited."""

import ctypes
import gc
import itertools
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import check, decode, encode, rotate

import rope_cupy
from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk, cpu

S, H, D, PAIRS = 5, 3, 10, 4
RNG = np.random.default_rng(23)
X = RNG.standard_normal((S, H, D), dtype=np.float32)
ANGLES = RNG.uniform(0, 7, (9, PAIRS))
COS, SIN = np.cos(ANGLES).astype(np.float32), np.sin(ANGLES).astype(np.float32)
ROWS = RNG.permutation(9)[:S].astype(np.int32)
TABLE = RotaryTable(COS, SIN)


class Legacy:
    """An array that speaks DLPack before version 1, and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Versioned(Legacy):
    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        return self.array.__dlpack__(max_version=max_version)


class LegacyArray(Legacy):
    """An array whose library can be asked to make one of a buffer."""

    def __array_namespace__(self, *, api_version=None):
        return SimpleNamespace(from_dlpack=lambda other: type(self)(torch.from_dlpack(other)))


class VersionedArray(Versioned, LegacyArray):
    pass


def numpy_array(array, dtype=None):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    return array.astype(dtype or array.dtype)


def torch_array(array, dtype=None):
    return torch.from_numpy(array.copy()).to(getattr(torch, dtype or array.dtype.name))


def jax_array(array, dtype=None):
    return pytest.importorskip("jax.numpy").asarray(array, dtype)


def protocol_array(array, dtype=None):
    return VersionedArray(torch_array(array, dtype))


LIBRARIES = {
    "numpy": numpy_array,
    "torch": torch_array,
    "jax": jax_array,
    "protocol": protocol_array,
}
IN_16_BITS = [(library, dtype) for library in LIBRARIES for dtype in ("float16", "bfloat16")]
IN_32_BITS = [(library, "float32") for library in LIBRARIES]
IN_64_BITS = [("numpy", "float64"), ("torch", "float64"), ("protocol", "float64")]


def doubles(array):
    """The numbers of an array of any library, in float64."""
    array = getattr(array, "array", array)
    if isinstance(array, torch.Tensor):
        return array.double().numpy()
    return np.asarray(array).astype(np.float64)


def assert_rotated(actual, x, dtype="float32", **options):
    exact = rotate(doubles(x)[None], np.float64(COS), np.float64(SIN), **options)[0]
    check(doubles(actual), exact, dtype)


@pytest.mark.parametrize(("library", "dtype"), IN_16_BITS + IN_32_BITS + IN_64_BITS)
def test_the_library_and_the_dtype_of_the_caller_come_back(library, dtype):
    q, k = (LIBRARIES[library](array, dtype) for array in (X, X[:, :1]))
    expected = decode(encode(np.float64(X), dtype), dtype)
    assert np.array_equal(doubles(q), expected)
    results = apply_rotary(q, TABLE), *apply_rotary_qk(q, k, TABLE)
    for y, x in zip(results, (q, q, k), strict=True):
        assert type(y) is type(x)
        y_array, x_array = getattr(y, "array", y), getattr(x, "array", x)
        assert (y_array.dtype, y_array.device) == (x_array.dtype, x_array.device)
        assert_rotated(y, x, dtype)
    assert np.array_equal(doubles(q), expected)


@pytest.mark.parametrize(("x_of", "table_of", "rows_of"), [*itertools.product(LIBRARIES, repeat=3)])
def test_the_table_and_the_positions_may_come_from_other_libraries(x_of, table_of, rows_of):
    x, rows = LIBRARIES[x_of](X), LIBRARIES[rows_of](ROWS)
    cos, sin = LIBRARIES[table_of](COS), LIBRARIES[table_of](SIN)
    y = apply_rotary(x, (cos, sin), positions=rows)
    assert type(y) is type(x)
    assert_rotated(y, x, positions=ROWS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("out_of", ["numpy", "torch", "protocol"])
@pytest.mark.parametrize("x_of", LIBRARIES)
def test_out_may_come_from_another_library(x_of, out_of, dtype):
    x = LIBRARIES[x_of](X, dtype)
    out, other = (LIBRARIES[out_of](np.zeros_like(X), dtype) for _ in range(2))
    assert apply_rotary(x, TABLE, out=out) is out
    assert_rotated(out, x, dtype)
    q, k = apply_rotary_qk(x, x, TABLE, positions=1, out=(out, other))
    assert q is out and k is other
    assert_rotated(q, x, dtype, positions=1)
    assert_rotated(k, x, dtype, positions=1)


def test_an_immutable_array_is_refused_as_out():
    x, out = jax_array(X), jax_array(np.zeros_like(X))
    for array in (x, out):
        with pytest.raises(ValueError, match=r"^out must .*writ.*, got "):
            apply_rotary(x, TABLE, out=array)
    assert np.array_equal(x, X)
    assert not np.any(out)


# The protocol and nothing more.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("kind", [LegacyArray, VersionedArray])
def test_a_producer_with_a_namespace_gets_an_array_of_its_own(kind, dtype):
    q, k = kind(torch_array(X, dtype)), kind(torch_array(X[:, 1:], dtype))
    for y, x in zip(apply_rotary_qk(q, k, TABLE), (q, k), strict=True):
        assert type(y) is kind
        assert_rotated(y, x, dtype)


@pytest.mark.parametrize("kind", [Legacy, Versioned])
def test_a_producer_without_a_namespace_must_be_given_an_out(kind):
    x = kind(X)
    with pytest.raises(TypeError, match=r"^out must be .*__array_namespace__.*, got None"):
        apply_rotary(x, TABLE)
    with pytest.raises(TypeError, match=r"^(q_out|out) must be .*__array_namespace__.*, got None"):
        apply_rotary_qk(x, x, TABLE)
    out = np.zeros_like(X)
    assert apply_rotary(x, TABLE, out=out) is out
    assert_rotated(out, x)


@pytest.mark.parametrize("kind", [Legacy, Versioned])
def test_a_table_and_positions_may_be_bare_producers(kind):
    y = apply_rotary(X, RotaryTable(kind(COS), kind(SIN)), positions=kind(ROWS))
    assert_rotated(y, X, positions=ROWS)


class Lender(Versioned):
    """A producer whose capsules alone own their memory."""

    def __dlpack__(self, **options):
        return self.array.copy().__dlpack__(**options)


@pytest.mark.parametrize("kind", [Legacy, Versioned, Lender])
def test_a_table_keeps_the_memory_of_a_producer(kind, monkeypatch):
    angles = RNG.uniform(0, 7, (4096, PAIRS))
    expected = apply_rotary(X, (np.cos(angles), np.sin(angles)), positions=ROWS)
    table = RotaryTable(kind(np.cos(angles)), kind(np.sin(angles)))
    rotate, churn = cpu.rotate, []

    def rotate_after_others_took_what_is_free(*arguments):
        gc.collect()
        churn.extend(np.full_like(angles, np.nan) for _ in range(64))
        rotate(*arguments)

    monkeypatch.setattr(cpu, "rotate", rotate_after_others_took_what_is_free)
    positions = kind(ROWS)
    assert np.array_equal(apply_rotary(X, table, positions=positions), expected)
    x = torch_array(X).requires_grad_() * 1
    apply_rotary(x, table, positions=positions, out=x)
    assert np.array_equal(x.detach(), expected)
    assert len(churn) == 128 and np.isnan(churn).all()


def test_a_versioned_producer_is_written_in_place():
    x = Versioned(X.copy())
    assert apply_rotary(x, TABLE, out=x) is x
    assert_rotated(x, X)


@pytest.mark.parametrize("kind", [Legacy, Versioned])
def test_a_producer_that_does_not_grant_writing_is_refused_as_out(kind):
    out = np.zeros_like(X)
    out.flags.writeable = kind is Legacy  # an unversioned capsule cannot say so
    with pytest.raises(ValueError, match=r"^out must .*writ.*, got "):
        apply_rotary(X, TABLE, out=kind(out))
    assert not out.any()


def test_a_dtype_that_only_another_library_knows_is_refused_by_name():
    for dtype in ("float8_e4m3fn", "bool"):
        x = jax_array(np.zeros_like(X), dtype)
        with pytest.raises(TypeError, match=r"^x must .*float16.*, got "):
            apply_rotary(x, TABLE)


class Future(Versioned):
    """A producer of capsules of DLPack's next major version, whose layout no one knows yet."""

    def __dlpack__(self, **options):
        capsule = self.array.__dlpack__(**options)
        signature = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
        pointer_of = signature(("PyCapsule_GetPointer", ctypes.pythonapi))
        ctypes.c_uint32.from_address(pointer_of(capsule, b"dltensor_versioned")).value = 2
        return capsule


def test_a_capsule_of_another_major_version_is_not_read():
    with pytest.raises(TypeError, match=r" must .*version 1, got 2\."):
        apply_rotary(Future(X), TABLE, out=np.zeros_like(X))


@pytest.mark.parametrize("kind", [LegacyArray, VersionedArray])
def test_no_capsule_outlives_the_call(kind):
    arrays = [array.copy() for array in (X, COS, SIN, ROWS)]
    alive = [weakref.ref(array) for array in arrays]
    x, cos, sin, rows = map(kind, arrays)
    y = apply_rotary(x, (cos, sin), positions=rows)
    buffer = weakref.ref(y.array)
    assert_rotated(y, x, positions=ROWS)
    del x, cos, sin, rows, arrays, y
    gc.collect()
    assert [reference() for reference in (*alive, buffer)] == [None] * 5


# NumPy and PyTorch by themselves.


class Tagged(np.ndarray):
    pass


@pytest.mark.parametrize("kind", [Tagged, np.memmap, np.matrix])
def test_a_subclass_of_ndarray_is_read_and_written_as_an_array(kind, tmp_path):
    flat = X.reshape(S, H * D)
    if kind is np.memmap:
        x = np.memmap(tmp_path / "x", np.float32, "w+", shape=flat.shape)
        x[:] = flat
    else:
        x = flat.copy().view(kind)
    y = apply_rotary(x, TABLE, head_dim=D)
    assert isinstance(y, np.ndarray) and y.shape == flat.shape
    assert_rotated(np.asarray(y).reshape(X.shape), X)
    assert apply_rotary(x, TABLE, head_dim=D, out=x) is x
    assert_rotated(np.asarray(x).reshape(X.shape), X)


def test_read_only_arrays_are_read():
    arrays = [array.copy() for array in (X, COS, SIN, ROWS)]
    for array in arrays:
        array.flags.writeable = False
    x, cos, sin, rows = arrays
    y = apply_rotary(x, (cos, sin), positions=rows)
    assert y.flags.writeable
    assert_rotated(y, X, positions=ROWS)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_new_array_lies_in_memory_as_x_does(library, order):
    x = LIBRARIES[library](X.transpose(order).copy())
    back = np.argsort(order)
    x = x.transpose(back) if library == "numpy" else x.permute(*back)
    for view in (x, x[1:, ::2], x[:, 1:, : 2 * PAIRS]):
        y = apply_rotary(view, TABLE)
        if library == "numpy":
            assert y.strides == np.empty_like(view).strides
        else:
            assert y.stride() == torch.empty_like(view).stride()
        assert_rotated(y, view)


def test_tensors_that_require_grad_are_rotated_where_gradients_are_off():
    x = torch.nn.Parameter(torch_array(X))
    cos, sin = torch_array(COS).requires_grad_(), torch_array(SIN).requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = apply_rotary(x, (cos, sin))
        assert type(y) is torch.Tensor and not y.requires_grad
        assert_rotated(y, X)


def test_inference_tensors_are_rotated_in_and_out_of_inference_mode():
    with torch.inference_mode():
        x, q = torch_array(X), torch_array(X)
        assert_rotated(apply_rotary(x, TABLE), X)
        apply_rotary_qk(q, x, TABLE, out=(q, torch.empty_like(x)))
        assert_rotated(q, X)
    assert x.is_inference()
    assert_rotated(apply_rotary(x, TABLE), X)


class Three:
    def __index__(self):
        return 3


@pytest.mark.parametrize("start", [np.int64(3), np.uint8(3), Three()], ids=type)
def test_anything_that_is_an_index_is_a_start(start):
    assert_rotated(apply_rotary(X, TABLE, positions=start), X, positions=3)


# Imports.

OPTIONAL = {"torch", "cupy", "ml_dtypes", "jax"}
UNINVITED = {
    "nothing": ("", OPTIONAL),
    "numpy": ("import numpy; x, t = numpy.ones((5, 3, 8)), numpy.ones((6, 4))", OPTIONAL),
    "torch": ("import torch; x, t = torch.ones(5, 3, 8), torch.ones(6, 4)", {"cupy", "jax"}),
    "jax": ("from jax.numpy import ones; x, t = ones((5, 3, 8)), ones((6, 4))", {"cupy", "torch"}),
}


@pytest.mark.parametrize("library", UNINVITED)
def test_no_library_is_imported_that_the_caller_does_not_use(library):
    if library != "nothing":
        pytest.importorskip(library)
    arrays, uninvited = UNINVITED[library]
    script = f"""
import sys, rope_cupy
{arrays}
if "x" in globals():
    q, k = rope_cupy.apply_rotary_qk(x, x, (t, t), positions=1)
    assert (type(q), abs(q[1] - x[1]).max()) == (type(x), 1)
print(*{uninvited} & set(sys.modules))
"""
    home = Path(rope_cupy.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script], cwd=home, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_a_trace_which_would_record_an_unwritten_result_is_refused():
    table = torch.ones(5, 4), torch.zeros(5, 4)
    with pytest.raises(TypeError, match=r"^x must not be traced"):
        torch.jit.trace(lambda x: apply_rotary(x, table), torch.ones(5, 2, 8), check_trace=False)
    numpy_table = np.ones((5, 4)), np.zeros((5, 4))  # which no graph can hold
    make_fx = torch.fx.experimental.proxy_tensor.make_fx
    with pytest.raises(TypeError, match=r"^x must not be traced"):
        make_fx(lambda x: apply_rotary(x, numpy_table))(torch.ones(5, 2, 8))
