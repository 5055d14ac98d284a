"""What producers may hand over: capsules of any name and state, odd answers, many types."""

import ctypes
import datetime
import gc
import importlib
import weakref

import numpy as np
import pytest
import torch
from arrays import Producer

import rope_cupy
from rope_cupy import RotaryTable, apply_rotary, dlpack, positions, tensor

TABLE = np.ones((4, 2), np.float32), np.zeros((4, 2), np.float32)


def fresh():
    return np.ones((4, 1, 4), np.float32)


class Odd:
    """A producer that answers whatever it is told to."""

    def __init__(self, capsule, device=(1, 0)):
        self.capsule, self.device = capsule, device

    def __dlpack__(self, **_):
        if isinstance(self.capsule, Exception):
            raise self.capsule
        return self.capsule

    def __dlpack_device__(self):
        return self.device


def consumed():
    capsule = fresh().__dlpack__()
    np.from_dlpack(Odd(capsule))
    return capsule


def changed(**fields):
    """A capsule whose array says something else."""
    capsule = fresh().__dlpack__()
    described, _ = dlpack._tensor_of("x", capsule)
    for name, value in fields.items():
        setattr(described, name, value)
    return capsule


def of_negative_size():
    capsule = fresh().__dlpack__()
    described, _ = dlpack._tensor_of("x", capsule)
    described.shape[0] = -4
    return capsule


NO_SIZES = ctypes.POINTER(ctypes.c_int64)()
ODD = {
    "of another name": (TypeError, "named", lambda: Odd(datetime.datetime_CAPI)),
    "consumed": (TypeError, "consumed", lambda: Odd(consumed())),
    "no capsule": (TypeError, "3", lambda: Odd(3)),
    "None": (TypeError, "None", lambda: Odd(None)),
    "without an address": (TypeError, "address", lambda: Odd(changed(data=None))),
    "without a shape": (TypeError, "3 axes", lambda: Odd(changed(shape=NO_SIZES))),
    "of many axes": (TypeError, "axes", lambda: Odd(changed(ndim=2**30))),
    "of fewer axes than none": (TypeError, "-1 axes", lambda: Odd(changed(ndim=-1))),
    "of a negative size": (ValueError, r"\(-4, 1, 4\)", lambda: Odd(of_negative_size())),
    "on another device than it says": (
        *(ValueError, "device type 7"),
        lambda: Odd(changed(device_type=7)),
    ),
    "no device": (TypeError, "None", lambda: Odd(fresh().__dlpack__(), None)),
    "half a device": (TypeError, r"\(1,\)", lambda: Odd(fresh().__dlpack__(), (1,))),
    "a device of letters": (TypeError, "ab", lambda: Odd(fresh().__dlpack__(), "ab")),
    "a buffer error": (TypeError, "Odd .*gone", lambda: Odd(BufferError("gone"))),
    "a runtime error": (TypeError, "Odd .*gone", lambda: Odd(RuntimeError("gone"))),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("argument", ["x", "positions", "out"])
def test_what_is_no_array_of_dlpack_is_refused_by_name(case, argument):
    error, got, make = ODD[case]
    x, given = fresh(), make()
    call = {"x": x, "table": TABLE} | {argument: given}
    with pytest.raises(error, match=rf"^{argument} must .*got .*{got}"):
        apply_rotary(call.pop("x"), call.pop("table"), **call)
    assert (x == 1).all()


def test_the_words_of_a_consumed_buffer_are_not_written():
    with pytest.raises(TypeError, match="consumed"):
        dlpack.set_bfloat16(consumed())


def test_an_array_of_jax_that_was_given_away_is_refused():
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((4, 1, 4))
    x.delete()
    with pytest.raises(TypeError, match=r"^x must be an array .*, got ArrayImpl"):
        apply_rotary(x, TABLE)


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
def test_what_jax_traces_is_refused_with_the_way_out(transform):
    jax = pytest.importorskip("jax")

    def loss(x):
        return apply_rotary(x, TABLE).sum()

    x = jax.numpy.ones((2, 4, 1, 4) if transform == "vmap" else (4, 1, 4))
    with pytest.raises(
        TypeError, match=r"^x must be an array in memory.*jax\.pure_callback.*Tracer"
    ):
        getattr(jax, transform)(loss)(x)

    def rotated(x):
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: apply_rotary(np.asarray(x), TABLE), like, x)

    if transform == "jit":
        assert np.array_equal(jax.jit(rotated)(x), apply_rotary(fresh(), TABLE))


def test_numpys_own_subclasses_are_read_as_what_they_are():
    flat = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert np.array_equal(
        apply_rotary(flat.view(np.matrix), TABLE, head_dim=4), apply_rotary(flat, TABLE, head_dim=4)
    )
    with pytest.raises(TypeError, match=r"^x must be an array without a mask, got MaskedArray"):
        apply_rotary(np.ma.array(fresh()), TABLE)
    with pytest.raises(TypeError, match=r"^x must have one of the dtypes .*, got object"):
        apply_rotary(fresh().astype(object), TABLE)


# What is remembered of the types of arrays.


def test_a_program_that_makes_types_does_not_grow():
    x, made = fresh(), []
    for _ in range(2 * tensor.MAX_TYPES):
        kind = type("Array", (Producer,), {})
        made.append(weakref.ref(kind))
        apply_rotary(kind(x), TABLE, out=kind(x))
        del kind
    gc.collect()
    alive = sum(ref() is not None for ref in made)
    assert alive <= tensor.MAX_TYPES
    for remembered in (
        tensor._library_of_type,
        tensor._library_of_exact_type,
        tensor.is_kind_of_array,
    ):
        assert remembered.cache_info().currsize <= tensor.MAX_TYPES


def test_options_that_were_turned_back_are_forgotten_in_the_end():
    module = importlib.import_module("rope_cupy.torch")
    x = torch.ones(4, 1, 4, requires_grad=True)
    for number in range(300):
        y = rope_cupy.apply_norm_rotary(x, None, tuple(map(torch.from_numpy, TABLE)), eps=number)
        y.sum().backward()
    assert 0 < module._conjugate.cache_info().currsize <= 256


# Where what is computed lands.

BUILDERS = {
    "frequencies": lambda like: RotaryTable.from_inverse_frequencies([1.0, 0.1], 8, like=like),
    "computed": lambda like: RotaryTable.from_inverse_frequencies(
        [1.0, 0.1], like=like, precompute=False
    ),
    "angles": lambda like: RotaryTable.from_angles(np.ones((3, 2)), like=like),
    **{
        f"{name}, {dtype}": lambda like, name=name, args=args, dtype=dtype: getattr(
            rope_cupy.diffusion, name
        )(*args, like=like, compute_dtype=dtype)
        for name, args in {
            "flux": (np.zeros((4, 3)),),
            "qwen_image": ([(1, 4, 4)], 3),
            "wan": ((2, 3, 4),),
            "hunyuan_video": ((2, 3, 4),),
            "ltx_video": ((2, 3, 4),),
            "cogvideox": ((2, 30, 45),),
        }.items()
        for dtype in ("float32", "float64")
    },
}


@pytest.fixture(params=["meta", "bfloat16"])
def default(request):
    """Defaults of PyTorch that are nobody's business here."""
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_table_lies_beside_like_whatever_pytorchs_defaults_are(builder, default):
    like = torch.zeros(1, device="cpu", dtype=torch.float32)
    torch.set_default_dtype(torch.float32)
    table = BUILDERS[builder](like)
    assert table.device == "cpu"
    assert table.dtype == ("frequency" if builder == "computed" else "float32")
    tokens = 4 if builder == "computed" else table.num_positions
    heads = table.shape[2] if table.axes == "bsh" else 1
    x = torch.ones(tokens, heads, table.rotary_dim, device="cpu")
    assert apply_rotary(x, table).isfinite().all()


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_table_has_the_same_bits_within_a_device_context(builder):
    like = torch.zeros(1, dtype=torch.float32)
    plain = BUILDERS[builder](like)
    with torch.device("meta"):
        there = BUILDERS[builder](like)
    for a, b in zip(plain._source.arrays, there._source.arrays, strict=True):
        assert b.device.type == "cpu"
        assert torch.equal(a, b)


def test_positions_lie_beside_like_too():
    with torch.device("meta"):
        own = positions.context_parallel(8, 1, 2, like=torch.zeros(1, device="cpu"))
    assert own.tolist() == [4, 5, 6, 7]
