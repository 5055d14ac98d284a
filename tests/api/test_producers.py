"""What producers may hand over: capsules of any name and state, odd answers, many types."""

import ctypes
import datetime
import gc
import importlib
import inspect
import pkgutil
import weakref
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from arrays import Producer

import rope_cupy
from rope_cupy import (
    RotaryTable,
    apply_norm_rotary,
    apply_rotary,
    apply_rotary_kv_cache,
    arrays,
    diffusion,
    eager,
    options,
    positions,
)
from rope_cupy.arrays import capsules

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


def consumed(**version):
    capsule = fresh().__dlpack__(**version)
    np.from_dlpack(Odd(capsule))
    return capsule


def changed(**fields):
    """A capsule whose array says something else."""
    capsule = fresh().__dlpack__()
    described, _ = capsules._tensor_of("x", capsule)
    for name, value in fields.items():
        setattr(described, name, value)
    return capsule


def with_first(field, number):
    """A capsule whose first size or stride is another."""
    capsule = fresh().__dlpack__()
    described, _ = capsules._tensor_of("x", capsule)
    getattr(described, field)[0] = number
    return capsule


class PyCapsule:
    """By its name a capsule."""

    def __repr__(self):
        raise RuntimeError("no one may look")


class Raising:
    """A producer of which every attribute raises."""

    def __getattr__(self, name):
        raise ZeroDivisionError("gone")

    @property
    def __dlpack_device__(self):
        return self.device

    __dlpack__ = __dlpack_device__


class Unreadable(np.ndarray):
    """An array of NumPy of which an attribute raises."""

    @property
    def strides(self):
        raise KeyError("gone")


def nested(layout):
    return torch.nested.nested_tensor([torch.ones(1, 4)] * 2, layout=layout)


NO_SIZES = ctypes.POINTER(ctypes.c_int64)()
ODD = {
    "of another name": (TypeError, "named", lambda: Odd(datetime.datetime_CAPI)),
    "consumed": (TypeError, "consumed", lambda: Odd(consumed())),
    "consumed, of version 1": (TypeError, "consumed", lambda: Odd(consumed(max_version=(1, 0)))),
    "no capsule": (TypeError, "3", lambda: Odd(3)),
    "a capsule by name": (TypeError, "PyCapsule", lambda: Odd(PyCapsule())),
    "None": (TypeError, "None", lambda: Odd(None)),
    "without an address": (TypeError, "address", lambda: Odd(changed(data=None))),
    "without a shape": (TypeError, "3 axes", lambda: Odd(changed(shape=NO_SIZES))),
    "of many axes": (TypeError, "axes", lambda: Odd(changed(ndim=2**30))),
    "of fewer axes than none": (TypeError, "-1 axes", lambda: Odd(changed(ndim=-1))),
    "of a negative size": (ValueError, r"\(-4, 1, 4\)", lambda: Odd(with_first("shape", -4))),
    "of more bytes than there are": (TypeError, "address", lambda: Odd(with_first("shape", 2**62))),
    "of a far stride": (TypeError, "address", lambda: Odd(with_first("strides", 2**62))),
    "of a far stride back": (TypeError, "address", lambda: Odd(with_first("strides", -(2**61)))),
    "of a far offset": (TypeError, "address", lambda: Odd(changed(byte_offset=2**64 - 8))),
    "on an odd device": (ValueError, "device type 7", lambda: Odd(changed(device_type=7))),
    "on a GPU, and says on the CPU": (ValueError, "cuda:0", lambda: Odd(changed(device_type=2))),
    "no device": (TypeError, "None", lambda: Odd(fresh().__dlpack__(), None)),
    "a device of floats": (TypeError, r"1\.5", lambda: Odd(fresh().__dlpack__(), (1.5, 0))),
    "a device of digits": (TypeError, "10", lambda: Odd(fresh().__dlpack__(), "10")),
    "a device past all": (ValueError, "device type", lambda: Odd(fresh().__dlpack__(), (2**70, 0))),
    "half a device": (TypeError, r"\(1,\)", lambda: Odd(fresh().__dlpack__(), (1,))),
    "a device of letters": (TypeError, "ab", lambda: Odd(fresh().__dlpack__(), "ab")),
    "a buffer error": (TypeError, "Odd .*gone", lambda: Odd(BufferError("gone"))),
    "a runtime error": (TypeError, "Odd .*gone", lambda: Odd(RuntimeError("gone"))),
    "an error of any kind": (TypeError, "Odd .*gone", lambda: Odd(OSError("gone"))),
    "a producer that raises": (TypeError, "Raising .*gone", Raising),
    "an array that raises": (TypeError, "Unreadable .*gone", lambda: fresh().view(Unreadable)),
    "a nested tensor": (TypeError, "nested", lambda: nested(torch.strided)),
    "a jagged tensor": (TypeError, "nested", lambda: nested(torch.jagged)),
    "objects": (TypeError, "object", lambda: fresh().astype(object)),
    "a masked array": (TypeError, "MaskedArray", lambda: np.ma.array(fresh())),
    "in another byte order": (TypeError, ">f4", lambda: fresh().astype(">f4")),
}


of_nested_tensors = pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning")


@of_nested_tensors
@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("argument", ["x", "positions", "out"])
def test_what_is_no_array_of_dlpack_is_refused_by_name(case, argument):
    error, got, make = ODD[case]
    x, out, given = fresh(), fresh() * 2, make()
    call = {"x": x, "table": TABLE, "out": out} | {argument: given}
    with pytest.raises(error, match=rf"^{argument} must .*got .*{got}"):
        apply_rotary(call.pop("x"), call.pop("table"), **call)
    assert (x == 1).all() and (out == 2).all()


@of_nested_tensors
@pytest.mark.parametrize("case", ODD)
def test_what_is_no_array_is_refused_as_part_of_a_table(case):
    error, got, make = ODD[case]
    with pytest.raises(error, match=rf"^sin must .*got .*{got}"):
        RotaryTable(TABLE[0], make())


@of_nested_tensors
@pytest.mark.parametrize("case", [case for case in ODD if case != "in another byte order"])
@pytest.mark.parametrize("argument", ["q", "v_cache", "slot_mapping"])
def test_what_is_no_array_is_refused_beside_caches(case, argument):
    """By its own name also where a new q_out would be made of it."""
    error, got, make = ODD[case]
    caches = np.zeros((2, 1, 4, 1, 4), np.float32)
    call = {"q": fresh(), "k": fresh(), "v": fresh(), "slot_mapping": np.arange(4)}
    call |= {"k_cache": caches[0], "v_cache": caches[1], "table": TABLE, argument: make()}
    with pytest.raises(error, match=rf"^{argument} must .*got .*{got}"):
        apply_rotary_kv_cache(**call)
    assert not caches.any()


def test_the_words_of_a_consumed_buffer_are_not_written():
    with pytest.raises(TypeError, match="consumed"):
        capsules.set_bfloat16(consumed())
    with pytest.raises(TypeError, match="16 bits, got 32"):
        capsules.set_bfloat16(fresh().__dlpack__())


def test_an_array_of_jax_that_was_given_away_is_refused():
    jax = pytest.importorskip("jax")
    deleted = jax.numpy.ones((4, 1, 4))
    given = jax.jit(lambda x: x + 1, donate_argnums=0)(deleted)
    assert deleted.is_deleted()
    for argument in ("x", "positions"):
        call = {"x": given, "positions": 0} | {argument: deleted}
        wanted = rf"^{argument} must be an array .*, got ArrayImpl \(it was deleted or donated\)"
        with pytest.raises(TypeError, match=wanted):
            apply_rotary(table=TABLE, **call)


def test_a_function_without_a_way_for_jax_names_the_way_out():
    jax = pytest.importorskip("jax")

    def rotated(x):
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: apply_rotary(np.asarray(x), TABLE), like, x)

    wanted = r"^inv_freq must be an array in memory.*jax\.pure_callback.*Tracer"
    with pytest.raises(TypeError, match=wanted):
        jax.jit(lambda x: RotaryTable.from_inverse_frequencies(x, 4, like=fresh()).shape)(
            jax.numpy.ones(2)
        )
    x = jax.numpy.ones((4, 1, 4))
    assert np.array_equal(jax.jit(rotated)(x), apply_rotary(fresh(), TABLE))


def test_numpys_own_subclasses_are_read_as_what_they_are():
    flat = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert np.array_equal(
        apply_rotary(flat.view(np.matrix), TABLE, head_dim=4), apply_rotary(flat, TABLE, head_dim=4)
    )


def test_bfloat16_numbers_of_other_producers_are_read_on_the_host():
    """By what reads values: frequencies and `check`."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    numbers = np.array([1.0, 0.5], ml_dtypes.bfloat16)
    for make in (lambda x: Producer(torch.from_numpy(x.astype("f4")).bfloat16()), jax_array):
        tables = [
            RotaryTable.from_inverse_frequencies(each, 8, like=fresh())
            for each in (make(numbers), numbers)
        ]
        for a, b in zip(*(table._source.arrays for table in tables), strict=True):
            assert np.array_equal(a, b)


def jax_array(array):
    return pytest.importorskip("jax.numpy").asarray(array)


class CuPyArray:
    """What an array of CuPy says of itself, in memory of the CPU."""

    def __init__(self, array, pointer=None):
        self.dtype, self.shape, self.strides = array.dtype, array.shape, array.strides
        self.size, self.itemsize, self.keep = array.size, array.itemsize, array
        pointer = array.ctypes.data if pointer is None else pointer
        self.data = SimpleNamespace(ptr=pointer, device_id=2)


CuPyArray.__module__, CuPyArray.__qualname__ = "cupy", "ndarray"


class OwnKind(CuPyArray):
    """A subclass that someone has made."""


def test_arrays_of_cupys_subclasses_are_read_as_its_own():
    x = fresh()
    for kind in (CuPyArray, OwnKind):
        seen = arrays.describe("x", kind(x[:, :, ::2]))
        assert type(seen.library).__name__ == "CuPy"
        assert seen.pointer == x.ctypes.data
        assert seen.spec[:4] == ((4, 1, 2), (4, 0, 2), "float32", "cuda:2")


def test_an_array_of_cupy_without_an_address_is_refused():
    """Such as one that lies on several GPUs."""
    with pytest.raises(TypeError, match=r"^x must be an array in memory, got OwnKind"):
        arrays.describe("x", OwnKind(fresh(), pointer=0))
    assert arrays.describe("x", OwnKind(fresh()[:0], pointer=0)).spec.shape == (0, 1, 4)
    with pytest.raises(TypeError, match=r"^x must be in native byte order, got >f4"):
        arrays.describe("x", OwnKind(fresh().astype(">f4")))


# What is remembered.

MANY = 10_000


def test_a_program_that_makes_types_does_not_grow():
    x, alive = fresh(), weakref.WeakSet()
    for _ in range(MANY):
        kind = type("Array", (Producer,), {})
        start = type("Start", (int,), {})
        alive |= {kind, start}
        apply_rotary(kind(x), TABLE, positions=start(0), out=x)
    kind = start = None
    gc.collect()
    assert len(alive) <= 2 * arrays.MAX_TYPES


def modules():
    for module in pkgutil.walk_packages(rope_cupy.__path__, "rope_cupy."):
        if not module.name.startswith(("rope_cupy.kernels", "rope_cupy.__main__")):
            yield importlib.import_module(module.name)


def test_a_program_that_makes_options_does_not_grow():
    x, sizes = torch.ones(1, 4, 1, 4), []
    caches = {
        id(each): each
        for module in modules()
        for each in vars(module).values()
        if hasattr(each, "cache_info")
    }
    weight = torch.ones(4, requires_grad=True)
    for i in range(0, MANY, 10):
        eps = [1e-6 * (i + j) for j in range(10)]
        y = apply_norm_rotary(x, weight, TABLE, eps=eps[0])
        y.sum().backward()
        for each in eps:
            options.check_norm("head", each, 0.0, True)
        sizes.append(sum(each.cache_info().currsize for each in caches.values()))
    assert len(caches) > 10
    assert len(eager._prepared) <= eager.MAX_PREPARED
    for each in caches.values():
        assert each.cache_info().currsize <= max(each.cache_info().maxsize or 0, 16)


def test_every_cache_is_bounded_unless_what_it_is_asked_for_is():
    """Of those that have no bound, one knows devices, one two dtypes, and the others nothing."""
    unbounded = {
        name: inspect.signature(each).parameters
        for module in modules()
        for name, each in vars(module).items()
        if hasattr(each, "cache_parameters") and each.cache_parameters()["maxsize"] is None
    }
    assert {name for name, parameters in unbounded.items() if parameters} <= {
        "_starts_early",
        "_numbers_of_8_bits",
    }


# Where what is computed lands.

GRIDS = {
    "flux": (np.arange(12).reshape(4, 3),),
    "flux2": (np.arange(16).reshape(4, 4),),
    "qwen_image": ([(1, 4, 4)], 3),
    "qwen_image_layered": ([(1, 4, 4), (1, 4, 4)], 3),
    "wan": ((2, 3, 4),),
    "hunyuan_video": ((2, 3, 4),),
    "cogvideox": ((2, 30, 45),),
    "ltx_video": ((2, 3, 4),),
    "z_image": ((1, 4, 4), 3),
    "lumina2": ((4, 4), 3),
    "qwen2_vl_vision": ([(1, 4, 4)],),
    "pixtral_vision": ([(4, 6)],),
}
BUILDERS = {
    "frequencies": lambda like: RotaryTable.from_inverse_frequencies([1.0, 0.1], 8, like=like),
    "computed": lambda like: RotaryTable.from_inverse_frequencies(
        [1.0, 0.1], like=like, precompute=False
    ),
    "angles": lambda like: RotaryTable.from_angles(np.ones((3, 2)), like=like),
    **{
        f"{name}, {dtype}": partial(getattr(diffusion, name), *grid, compute_dtype=dtype)
        for name, grid in GRIDS.items()
        for dtype in ("float32", "float64")
    },
}


@contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
    "half": lambda: default_dtype(torch.float16),
    "double": lambda: default_dtype(torch.float64),
}
with_any_default = pytest.mark.parametrize("default", DEFAULTS)


def test_every_builder_is_tried():
    assert {*GRIDS} == {
        name
        for name, each in vars(diffusion).items()
        if inspect.isfunction(each) and each.__module__ == diffusion.__name__ and name[0] != "_"
    }


@with_any_default
@pytest.mark.parametrize("builder", BUILDERS)
def test_a_table_lies_beside_like_whatever_pytorchs_defaults_are(builder, default):
    like = torch.zeros(1)
    plain = BUILDERS[builder](like=like)
    with DEFAULTS[default]():
        table = BUILDERS[builder](like=like)
    assert (table.device, table.dtype) == ("cpu", plain.dtype)
    for mine, other in zip(table._source.arrays, plain._source.arrays, strict=True):
        assert mine.device.type == "cpu"
        assert torch.equal(mine, other)


@with_any_default
def test_positions_lie_beside_like_too(default):
    like = torch.zeros(1)
    with DEFAULTS[default]():
        own = positions.context_parallel(8, 1, 2, like=like)
    assert own.device.type == "cpu" and own.dtype == torch.int64
    assert own.tolist() == [4, 5, 6, 7]
