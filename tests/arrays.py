"""Test arrays of any library, dtype and strides inside buffers full of canaries, and whole calls.

A `Held` is a view in a larger buffer: `.array` is what the library under test gets, every other
byte is a canary (NaN for numbers, a row far outside any table for positions), so that what is read
beside the view spoils the result and what is written beside it is found. A `Case` is one call in
every respect that can make a difference; `sample` draws many, `verify` makes a call and judges it.

Libraries by name: numpy, torch and dlpack (nothing but the protocol) on the CPU; cupy, torch-cuda
and dlpack-cuda on the GPU; jax and jax-cuda.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from forgetting import forget
from reference import (
    FORMATS,
    Error,
    arranged,
    canonical,
    check,
    cos_sin_at,
    decode,
    encode,
    layer_normalised,
    normalised,
    pair_norms,
    rotate,
    rotate_eagerly,
    rounded,
    row_number,
    sequence_places,
    to_bits,
)

import rope_cupy
from rope_cupy import plan, row_order

HAS_ML_DTYPES = importlib.util.find_spec("ml_dtypes") is not None

# What lies in memory: bits for the formats of reference.py, else the type itself. And its canary.
ELEMENTS: dict[str, Any] = {name: format.bits for name, format in FORMATS.items()}
ELEMENTS |= {name: np.dtype(name) for name in ("complex64", "complex128", "int32", "int64")}
CANARIES = {
    "float16": b"\xa5\x7e",
    "bfloat16": b"\xa5\x7f",
    "float32": b"\xa5\xa5\xc5\x7f",
    "float64": b"\xa5\xa5\xa5\xa5\xa5\xa5\xfa\x7f",
    "int32": b"\xa5\xa5\xa5\x7a",
    "int64": b"\xa5\xa5\xa5\xa5\xa5\xa5\xa5\x7a",
}
CANARIES |= {"complex64": 2 * CANARIES["float32"], "complex128": 2 * CANARIES["float64"]}
GUARD = 64  # elements of canary at both ends; whole vectors, so that "dense" is aligned

STYLES = "dense padded ragged packed swapped transposed stepped offset1 offset2 offset4".split()
INPUT_STYLES = ["repeated", "repeated heads"]  # of stride 0: not for outputs
NUMPY_STYLES = ["reversed"]  # of negative strides: for NumPy and CuPy alone


# Parameters of tests that a library, or a pairing, makes no difference to.

ON_THE_HOST = pytest.param("numpy", marks=pytest.mark.host_cuda, id="host_cuda")


def on_every(*libraries):
    """Parametrize `library`, marking those on a GPU."""
    gpu = [name for name in libraries if name in ("cupy", "torch-cuda", "jax-cuda")]
    params = [pytest.param(x, marks=pytest.mark.gpu) if x in gpu else x for x in libraries]
    return pytest.mark.parametrize("library", params)


in_every_library = on_every("numpy", "torch", "cupy", "torch-cuda", ON_THE_HOST)
PAIRINGS = {"half": False, "interleaved": True}
in_both_pairings = pytest.mark.parametrize("interleaved", PAIRINGS.values(), ids=PAIRINGS)


class Strides(NamedTuple):
    """Strides of any kind, for up to four axes; an array of fewer takes the last ones."""

    order: tuple[int, ...]  # of the axes in memory, outermost first
    gaps: tuple[int, ...]  # elements left out behind each index of an axis
    backward: tuple[bool, ...]
    repeated: tuple[bool, ...]  # of stride 0
    offset: int  # elements from an aligned address to the first one in memory

    def __str__(self) -> str:
        flags = ["".join("ny"[flag] for flag in flags) for flags in (self.backward, self.repeated)]
        numbers = [".".join(map(str, numbers)) for numbers in (self.order, self.gaps)]
        return "_".join([*numbers, *flags, str(self.offset)])

    def place(self, shape: tuple[int, ...]) -> Placement:
        """Where these strides put an array of a shape."""
        first, size, start = 4 - len(shape), 1, 0
        strides = [0] * len(shape)
        for axis in reversed([axis - first for axis in self.order if axis >= first]):
            if not self.repeated[first + axis]:
                stride = size + self.gaps[first + axis]
                size = stride * max(shape[axis], 1)
                backward = self.backward[first + axis]
                strides[axis] = -stride if backward else stride
                start += stride * max(shape[axis] - 1, 0) if backward else 0
        start += GUARD + self.offset
        return Placement(tuple(strides), start, GUARD + self.offset + size + GUARD)


class Placement(NamedTuple):
    """Where a view lies in its buffer, in elements."""

    strides: tuple[int, ...]
    offset: int
    size: int  # of the whole buffer


def place(
    shape: tuple[int, ...], style: str | Strides, heads: int = -1, unit: int = 1
) -> Placement:
    """Strides of a style for a shape; `heads` is its axis of heads, each `unit` elements of it."""
    if isinstance(style, Strides):
        return style.place(shape)
    order = list(range(len(shape)))  # in memory, outermost first
    extent = list(shape)
    step = 2 if style == "stepped" else 1
    start = int(style.removeprefix("offset")) if style.startswith("offset") else 0
    if style in ("padded", "ragged"):  # gaps along every axis, of whole vectors or of odd elements
        start = 8 if style == "padded" else 3
        extent = [n + 1 for n in shape[:-1]] + [shape[-1] + start]
    elif style == "packed":  # the heads in the midst of others, as in a packed qkv
        extent[heads] += 3 * unit
    elif style == "swapped":  # the outer axes the other way round, as after .transpose(1, 2)
        order[:-1] = order[-2::-1]
    elif style == "transposed":  # the last axis outermost
        order.reverse()
    elif style in INPUT_STYLES:
        extent[0 if style == "repeated" or heads == -1 else heads] = 1

    strides, size = [0] * len(shape), step
    for axis in reversed(order):
        strides[axis] = size if extent[axis] >= shape[axis] else 0
        size *= extent[axis]
    if style == "packed":
        start = unit * strides[heads]
    elif style == "reversed":
        start = sum(max(n - 1, 0) * stride for n, stride in zip(shape, strides, strict=True))
        strides = [-stride for stride in strides]
    return Placement(tuple(strides), GUARD + start, GUARD + start + size + GUARD)


class Producer:
    """An array that is nothing but DLPack, as a library no one here has heard of hands it over."""

    def __init__(self, array: Any):
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __array_namespace__(self, *, api_version: str | None = None) -> SimpleNamespace:
        source = importlib.import_module(type(self.array).__module__.partition(".")[0])
        return SimpleNamespace(from_dlpack=lambda array, **_: Producer(source.from_dlpack(array)))


class Held:
    """An array of a library as a view inside a buffer of canaries."""

    def __init__(self, elements: np.ndarray, dtype: str, library: str, place: Placement):
        """Hold `elements`, of ELEMENTS[dtype]; the last ones along an axis of stride 0."""
        if library.startswith("jax"):  # its arrays have no strides, and nothing around them
            place = Placement(np.empty(elements.shape, "V1").strides, 0, elements.size)
        self._place, item = place, np.dtype(ELEMENTS[dtype])
        self._before = np.frombuffer(CANARIES[dtype] * place.size, np.uint8).copy()
        view = self._view(self._before, item, elements.shape)
        view[...] = elements
        self.elements = view.copy()
        inside = np.zeros(self._before.size, bool)
        self._view(inside, f"V{item.itemsize}", elements.shape)[...] = b"\1" * item.itemsize
        self._outside = ~inside
        self._buffer, self.array = self._upload(dtype, library, elements.shape)

    def _view(self, buffer: Any, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        strides = [size * stride for stride in self._place.strides]
        return np.ndarray(shape, dtype, buffer, self._place.offset * size, strides)

    def _upload(self, dtype: str, library: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
        (strides, offset, _), host = self._place, self._before.copy()
        if library.startswith("dlpack"):  # around another's memory: NumPy exports no bfloat16
            owners = {"dlpack": ("numpy", "torch"), "dlpack-cuda": ("cupy", "torch-cuda")}[library]
            buffer, array = self._upload(dtype, owners[dtype == "bfloat16"], shape)
            return buffer, Producer(array)
        if library.startswith("torch"):
            torch = pytest.importorskip("torch")
            buffer = torch.from_numpy(host).to("cuda" if library == "torch-cuda" else "cpu")
            return buffer, buffer.view(getattr(torch, dtype)).as_strided(shape, strides, offset)
        own = dtype != "bfloat16"
        kind = np.dtype(dtype if own else pytest.importorskip("ml_dtypes").bfloat16)
        if library == "numpy":
            return host, self._view(host, kind, shape)
        if library == "cupy":
            cupy = pytest.importorskip("cupy")
            buffer, strides = cupy.asarray(host), [kind.itemsize * stride for stride in strides]
            return buffer, cupy.ndarray(shape, kind, buffer.data + offset * kind.itemsize, strides)
        jax = pytest.importorskip("jax")
        devices = [device for device in jax.devices() if device.platform == "gpu"]
        if library == "jax-cuda" and not devices:
            pytest.skip("JAX has no GPU here")
        device = devices[0] if library == "jax-cuda" else jax.devices("cpu")[0]
        array = jax.device_put(self._view(host, kind, shape), device)
        return array, array

    def become_parameter(self) -> None:
        """Be what a module holds: a torch.nn.Parameter, of which no gradient is wanted here."""
        parameter = importlib.import_module("torch").nn.Parameter
        self.array = parameter(self.array, requires_grad=False)

    def assert_unchanged(self) -> None:
        """No byte of the buffer has changed."""
        assert not self._changed().any(), f"{self._changed().sum()} bytes of an input have changed"

    def assert_guarded(self) -> None:
        """No byte outside the view has changed."""
        outside = self._changed() & self._outside
        assert not outside.any(), f"{outside.sum()} bytes outside the view have changed"

    def _changed(self) -> np.ndarray:
        return to_bits(self._buffer).reshape(-1).view(np.uint8) != self._before


def hold(values: Any, dtype: str, library: str, style: str | Strides = "dense") -> Held:
    """Hold numbers, rounded to dtype, in a library's array of the given style of strides."""
    elements = encode(values, dtype) if dtype in FORMATS else np.asarray(values).astype(dtype)
    return Held(elements, dtype, library, place(elements.shape, style))


def in_order_of(y: Any, x: Any) -> bool:
    """Whether y is dense and its axes lie in memory in the order of x's, as of numpy.empty_like."""
    y, x = (getattr(array, "array", array) for array in (y, x))
    if 0 in x.shape or not (hasattr(y, "stride") or hasattr(y, "strides")):
        return True  # no elements, or an array of JAX
    y_strides, x_strides = (a.stride() if hasattr(a, "stride") else a.strides for a in (y, x))
    memory = np.empty(1, np.dtype(f"V{1 if hasattr(y, 'stride') else y.itemsize}"))
    like = np.empty_like(np.lib.stride_tricks.as_strided(memory, x.shape, x_strides))
    return all(n == 1 or a == b for n, a, b in zip(x.shape, like.strides, y_strides, strict=True))


FORMS = ["half", "full", "elementwise", "cache", "complex", "matrices", "frequencies", "none"]
TWO_ANGLES = "elementwise", "matrices"  # of which each element of a pair has one


class Angles(NamedTuple):
    """Cosines and sines, half width, of the first elements of pairs and of the second ones."""

    cos: np.ndarray
    sin: np.ndarray
    second: tuple[np.ndarray, np.ndarray] | None = None  # None where they are the same


def make_table(angles: Angles, case: Case) -> tuple[rope_cupy.RotaryTable, list[Held]]:
    """A RotaryTable of the case's form, and what holds its memory."""
    table, dtype = rope_cupy.RotaryTable, case.table_dtype
    cos, sin, second = angles
    make, arrays = table, [cos, sin]
    if case.form in ("full", "elementwise"):
        make = table.from_full_width if case.form == "full" else table.from_elementwise
        parts = zip((cos, sin), second or (cos, sin), strict=True)
        if case.interleaved:
            arrays = [np.stack(part, -1).reshape(*cos.shape[:-1], -1) for part in parts]
        else:
            arrays = [np.concatenate(part, -1) for part in parts]
    elif case.form == "cache":
        make, arrays = table.from_cache, [np.concatenate(arrays, -1)]
    elif case.form == "complex":
        make, arrays = table.from_complex, [cos + 1j * sin]
        dtype = {"float32": "complex64", "float64": "complex128"}[dtype]
    elif case.form == "matrices":
        second_cos, second_sin = second
        rows = [np.stack([cos, -sin], -1), np.stack([second_sin, second_cos], -1)]
        make, arrays = table.from_matrices, [np.stack(rows, -2)]
    held = [hold(array, dtype, case.table_library, case.table_style) for array in arrays]
    return make(*(h.array for h in held)), held


def table_values(held: list[Held], case: Case) -> Angles:
    """The cosines and sines, half width, that the memory of a table holds."""
    values = [h.elements for h in held]
    if case.form != "complex":
        values = [decode(elements, case.table_dtype) for elements in values]
    first, last = values[0], values[-1]
    width = first.shape[-1] // 2
    if case.form in ("full", "elementwise"):
        halves = np.s_[..., :width], np.s_[..., width:]
        one, other = (np.s_[..., ::2], np.s_[..., 1::2]) if case.interleaved else halves
        second = (first[other], last[other]) if case.form == "elementwise" else None
        return Angles(first[one], last[one], second)
    if case.form == "cache":
        return Angles(first[..., :width], first[..., width:])
    if case.form == "complex":
        return Angles(np.float64(first.real), np.float64(first.imag))
    if case.form == "matrices":
        return Angles(first[..., 0, 0], -first[..., 0, 1], (first[..., 1, 1], first[..., 1, 0]))
    return Angles(first, last)


def _of_tokens(part: Any, start: int, tokens: int) -> Any:
    """Cosines and sines of a table by token from one on, of the first angle or of both."""
    if part is None:
        return None
    if isinstance(part, tuple):
        return tuple(_of_tokens(each, start, tokens) for each in part)
    return part[:, start : start + tokens]


class Case(NamedTuple):
    """One call of apply_rotary or apply_rotary_qk, or of their kin that normalise."""

    dtype: str
    table_dtype: str = "float32"
    interleaved: bool = False
    form: str = "half"
    conjugate: bool = False
    library: str = "numpy"
    table_library: str = "same"
    head: tuple[int, int, int] = (64, 64, 0)  # head_dim, rotary_dim, rotary_offset
    sizes: tuple[int, int, int, int] = (2, 5, 3, 1)  # batch, tokens, heads of q and k (0: no k)
    layout: str = "bshd"  # parentheses join two axes, which head_dim splits
    style: str | Strides = "dense"  # of q's strides, and of k's output
    k_style: str | Strides = "dense"  # of k's strides, and of q's output
    rows: str = "position"  # the table has one a position, or a batch's token, or such a head
    table_style: str | Strides = "dense"
    positions: str = "none"
    outside: str = "inside"  # are positions beside the table, and what becomes of their tokens
    write: str = "new"
    rounding: str = "once"
    norm: str = "none"
    weights: str = "none"  # their dtype
    round_norm: bool | str = False
    norm_after: bool = False

    @property
    def rotates(self) -> bool:
        """Whether there is a table."""
        return self.form != "none"

    @property
    def is_after(self) -> bool:
        """Whether what is rotated is normalised."""
        return self.norm_after and self.rotates

    def without_norm(self) -> Case:
        """The case with a rotation alone."""
        form = self.form if self.rotates else "half"
        fields = {"norm": "none", "weights": "none", "round_norm": False, "norm_after": False}
        return self._replace(form=form, **fields)

    @property
    def kind(self) -> str:
        """What results are summed up with, where accuracy is told."""
        if self.norm != "none":
            return f"{self.dtype}, normalised"
        if self.rounding == "eager":
            return f"{self.dtype}, rounded eagerly"
        return f"{self.dtype}, from frequencies" if self.form == "frequencies" else self.dtype

    def __str__(self) -> str:
        words = {2: ["half", "interleaved"], 4: ["forward", "conjugate"]}
        values = [words[i][value] if i in words else value for i, value in enumerate(self)]
        values = [".".join(map(str, v)) if type(v) is tuple else str(v) for v in values]
        return "-".join(values).replace(" ", "_")


# The other library on the same device, for tables and outputs that are not of the input's library.
OTHER = {"numpy": "torch", "torch": "numpy", "dlpack": "torch", "jax": "numpy"}
OTHER |= {"cupy": "torch-cuda", "torch-cuda": "cupy", "dlpack-cuda": "cupy", "jax-cuda": "cupy"}
DEFAULT_LAYOUTS = ["shd", "bshd", "s(hd)", "bs(hd)"]
OUTSIDE = {  # rows of no table; the last would be rows of one if they lost their upper half
    "int32": [-1, -(2**31), 2**31 - 1],
    "int64": [-1, -(2**31), 2**31, -(2**63), 2**63 - 1, -(2**32), 2**32, 2**32 + 1],
}
INDEX = "int32", "int64"
COMPUTED_ERROR = 1.5e-7  # of a result from frequencies, for a pair of norm 1
NORM_ERROR = 6e-7  # of one that is normalised, of sums, roots and products in float32
EPS, WEIGHT_OFFSET = 1e-3, 0.25  # of every norm here
MOST_COMPUTED = 4096  # positions of frequencies, for which an error of 2^-65 turns has no weight
OPTIONS: dict[str, list[Any]] = {
    "dtype": list(FORMATS),
    "table_dtype": list(FORMATS),
    "interleaved": [False, True],
    "form": FORMS,
    "conjugate": [False, True],
    "table_library": ["same", "other"],
    "head": [
        *((n, n, 0) for n in (2, 6, 64, 72, 80, 96, 128, 256, 320, 512)),
        *((6, 2, 3), (80, 32, 0), (90, 24, 0), (90, 24, 13), (90, 24, 66), (96, 94, 1)),
        *((128, 64, 0), (128, 64, 64), (192, 64, 128), (256, 64, 8), (320, 72, 8), (512, 64, 448)),
    ],
    "sizes": [(2, 5, 3, 1), (3, 2, 4, 4), (1, 7, 2, 0), (2, 1, 8, 2), (1, 33, 1, 1), (2, 17, 5, 0)],
    "layout": "bshd shd bhsd hsd sbhd thd hbtd bs(hd) s(hd) sb(hd)".split(),
    "style": STYLES + NUMPY_STYLES + INPUT_STYLES,
    "k_style": STYLES + NUMPY_STYLES + INPUT_STYLES,
    "rows": ["position", "position", "position", "batch", "head"],
    "table_style": [*STYLES, "reversed", "repeated"],
    "positions": [
        *("none", "int", *(f"{dtype} {shape}" for dtype in INDEX for shape in ("s", "bs", "1s"))),
        *(f"{dtype} {kind}" for dtype in INDEX for kind in ("offset", "packed", "packed offset")),
        *("int32 3s", "int64 3bs", "int64 31s", "int32 3bs mixed", "int64 3s mixed"),
    ],
    "outside": ["inside", "nan", "keep"],
    "write": ["new", "out", "out other", "in place"],
    "rounding": ["once", "once", "once", "eager"],
    "norm": ["none", "none", "head", "heads", "layer"],
    "weights": ["none", *FORMATS],
    "round_norm": [False, True, "before_weight"],
    "norm_after": [False, False, True],
}


def sample(count: int, seed: int, **options: list[Any]) -> list[Case]:
    """Cases that show every value of an option equally often, mixed at random but always alike."""
    rng, columns = np.random.default_rng(seed), {}
    for name, values in (OPTIONS | options).items():
        columns[name] = [values[i] for i in rng.permutation(np.arange(count) % len(values))]
    rows = zip(*columns.values(), strict=True)
    cases = {possible(Case(**dict(zip(columns, row, strict=True)))) for row in rows}
    return sorted(cases)  # neighbours share a kernel


def alike(count: int, seed: int, **options: list[Any]) -> list[Case]:
    """Cases where each head has angles of its own, and q and k differ in where they lie alone."""
    options = {
        "sizes": [(2, 5, 4, 4), (1, 9, 2, 2), (3, 2, 6, 6)],
        "norm": ["none", "heads"],
    } | options
    cases = sample(count, seed, rows=["head"], norm_after=[False], **options)
    return sorted({possible(case._replace(k_style=case.style)) for case in cases})


def possible(case: Case) -> Case:
    """The nearest case that makes sense."""
    batch, tokens, q_heads, k_heads = case.sizes
    dtype = case.table_dtype
    norm = case.norm if case.head[0] <= 512 else "none"
    form = "half" if case.form == "none" and norm == "none" else case.form
    computed, rotates = form == "frequencies", form != "none"
    if (computed or not rotates) or (form == "complex" and dtype not in ("float32", "float64")):
        dtype = "float32"
    rows = "position" if form in ("cache", "frequencies", "none") else case.rows
    positions = case.positions if rows == "position" and rotates else "none"
    if norm == "heads" and not fits_a_block(case):
        norm = "head"
    weights = case.weights if norm != "none" else "none"
    library = able(case.library, case.dtype)
    owner = able(library if case.table_library == "same" else OTHER[library], dtype)
    written = case.write == "in place"
    return case._replace(
        table_dtype=dtype,
        form=form,
        interleaved=case.interleaved and rotates,
        conjugate=case.conjugate and rotates,
        library=library,
        table_library=owner,
        sizes=(
            batch if "b" in case.layout and "packed" not in positions else 1,
            tokens,
            q_heads,
            k_heads,
        ),
        style=known(case.style, library, written),
        k_style=known(case.k_style, library, written),
        rows=rows,
        table_style="dense" if computed else known(case.table_style, owner, written=False),
        positions=positions,
        outside=case.outside if " " in positions else "inside",
        norm=norm,
        weights="float32" if weights == "bfloat16" and owner != "torch" else weights,
        round_norm=norm != "none" and case.round_norm,
        norm_after=norm != "none" and case.norm_after,
    )


def fits_a_block(case: Case) -> bool:
    """Whether any strides let a block of threads have all heads of a token: see the planner."""
    *_, q_heads, k_heads = case.sizes
    of_all = math.gcd(q_heads, k_heads)
    shared = max(
        rows for rows in range(1, 9) if (of_all % rows == 0 and case.rows != "head") or rows == 1
    )
    return max(q_heads, k_heads) // shared * case.head[0] <= 512


def able(library: str, dtype: str) -> str:
    """The library, or torch where it is NumPy or CuPy and has no bfloat16 for want of ml_dtypes."""
    lacking = dtype == "bfloat16" and not HAS_ML_DTYPES and library in ("numpy", "cupy")
    return OTHER[library] if lacking else library


def repeats(style: str | Strides) -> bool:
    """Whether elements of the array share memory."""
    return any(style.repeated) if isinstance(style, Strides) else style.startswith("repeated")


def known(style: str | Strides, library: str, written: bool) -> str | Strides:
    """The style, or another where the library knows no such strides or they cannot be written."""
    if isinstance(style, Strides):
        if library not in ("numpy", "cupy"):
            style = style._replace(backward=(False,) * 4)
        return style._replace(repeated=(False,) * 4) if written else style
    if style in NUMPY_STYLES and library not in ("numpy", "cupy"):
        return "ragged"
    return "packed" if written and style in INPUT_STYLES else style


@contextmanager
def small_tiles() -> Iterator[None]:
    """Take a table of a few rows for one that does not stay in a cache: see the planner's tiles."""
    sizes = {"L2_BYTES": 8, "TILE_BYTES": 2**10, "MIN_TILE": 1}

    def forget_plans() -> None:
        plan.launch_plan.cache_clear()
        plan.joint_plan.cache_clear()
        forget()

    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(row_order, name, size)
        forget_plans()
        yield
    forget_plans()


class Call:
    """The arrays and options of a case, and the calls that they allow."""

    def __init__(self, case: Case):
        self.case, self._rng = case, np.random.default_rng(zlib.crc32(str(case).encode()))
        rng, (head_dim, rotary_dim, offset) = self._rng, case.head
        if not case.rotates:
            rotary_dim, offset = 0, 0
        batch, tokens, *heads = case.sizes
        self.axes = case.layout.replace("(", "").replace(")", "")
        self.split = head_dim if "(" in case.layout else None
        self.rotated = np.isin(np.arange(head_dim), np.arange(offset, offset + rotary_dim))
        self.styles = [case.style, case.k_style]
        self.inputs = self.hold_heads(case.library, self.styles)

        first = 3 if case.positions == "int" else 0
        leading = (first + tokens + 4,)
        if case.rows != "position":
            # One token of the table may stand for all, and one of its heads for several.
            of_tokens = rng.choice([tokens, tokens, 1, tokens + 2])
            leading = (rng.choice([1, batch]), of_tokens, rng.choice([1, math.gcd(*heads)]))
            leading = leading[: 3 if case.rows == "head" else 2]
        self.where: dict[str, Any] = {"positions": first} if case.positions == "int" else {}
        self.rows: Any = self.where.get("positions")
        self.options: dict[str, Any] = {}
        if case.form == "frequencies":
            inv_freq = 4 * np.float64(100) ** -rng.random(rotary_dim // 2)
            like = hold([0.0], "float32", case.table_library).array
            make = rope_cupy.RotaryTable.from_inverse_frequencies
            self.table, self.held = make(inv_freq, like=like, precompute=False), []
            leading = (MOST_COMPUTED,)
        elif not case.rotates:
            self.table, self.held = None, []
        else:
            angle, other = rng.uniform(-np.pi, np.pi, (2, *leading, rotary_dim // 2))
            second = (np.cos(other), np.sin(other)) if case.form in TWO_ANGLES else None
            self.table, self.held = make_table(Angles(np.cos(angle), np.sin(angle), second), case)
            self.angles = table_values(self.held, case)
            if case.rows != "position" and leading[1] > tokens:
                start = int(rng.integers(leading[1] - tokens + 1))
                self.where = {"positions": start}
                self.angles = Angles(*(_of_tokens(each, start, tokens) for each in self.angles))
        if " " in case.positions:
            dtype, kind = case.positions.split(maxsplit=1)
            self.rows = self.hold_rows(dtype, kind, leading[0])
        if case.form == "frequencies":
            given = isinstance(self.rows, np.ndarray)
            rows = self.rows if given else np.arange(tokens) + (self.rows or 0)
            inside = (rows >= 0) & (rows < 2**63 - 1)
            used, row = np.unique(np.where(inside, rows, 0), return_inverse=True)
            self.rows = np.where(inside, row.reshape(rows.shape), -1)
            self.angles = Angles(*cos_sin_at(used, inv_freq))
        self.outside = None if self.rows is None else self.beside(len(self.angles.cos))
        own_pairing = case.form in ("complex", "matrices")
        is_own = case.interleaved == own_pairing and rng.random() < 0.5
        self.options |= {
            # None is the table's own.
            "interleaved": None if is_own or not case.rotates else case.interleaved,
            "rotary_offset": offset,
            "conjugate": case.conjugate,
            "out_of_range": "keep" if case.outside == "keep" else "nan",
            "rounding": case.rounding,
        }
        self.weights = [] if case.weights == "none" else self.hold_weights(case.weights)
        self.biases_dtype = "float32" if case.weights == "none" else case.weights
        has_biases = case.norm == "layer" and rng.random() < 0.7
        self.biases = self.hold_weights(self.biases_dtype) if has_biases else []

    def hold_weights(self, dtype: str) -> list[Held]:
        """Weights or biases of each tensor, of its own or of both."""
        case, rng, (head_dim, *_) = self.case, self._rng, self.case.head
        sizes = [head_dim * (n if case.norm == "heads" else 1) for n in case.sizes[2:] if n]
        values = [rng.standard_normal(size) for size in sizes]
        library = able(case.table_library, dtype)
        styles = ["dense", "stepped", "offset1", "repeated"]
        held = [hold(value, dtype, library, styles[rng.integers(4)]) for value in values]
        if len({*sizes}) == 1 and rng.random() < 0.5:  # one for both, as in some models
            held = held[:1] * len(values)
        if library.startswith("torch") and rng.random() < 0.5:  # as in every model
            for weight in held:
                weight.become_parameter()
        self.held += held
        return held

    def hold_rows(self, dtype: str, kind: str, num_rows: int) -> np.ndarray:
        """Hold what tells the row of each token, and return those: of a token in none, -1."""
        case, rng = self.case, self._rng
        batch, tokens, *_ = case.sizes

        def held(name: str, values: np.ndarray, most: int, dtype: str = dtype) -> np.ndarray:
            if case.outside != "inside" and name != "cu_seqlens":
                beside = [*OUTSIDE[dtype], most]
                if case.form == "frequencies":  # which hold what is not negative
                    beside = [row for row in beside if not 0 <= row < 2**63 - 1]
                outside = rng.choice(beside, values.shape)
                values = np.where(rng.random(values.shape) < 0.4, outside, values)
            self.held.append(hold(values, dtype, case.table_library, case.table_style))
            self.where[name] = self.held[-1].array
            return self.held[-1].elements.astype(np.int64)

        def offsets_of(count: int) -> np.ndarray:
            """Offsets, in part beside an int that is added to them: numbers of any size."""
            sums = rng.integers(0, num_rows - tokens, count).tolist()
            beside = case.outside != "inside"
            computed = beside and case.form == "frequencies"  # whose rows are next to all numbers
            first = 0 if computed else int(rng.choice([0, 0, 2, -3]))
            if beside and not computed and dtype == "int64" and rng.random() < 0.4:
                first = int(rng.choice([2**63 - 1, -(2**63), 2**62, -(2**62)]))
                sums = rng.integers(-tokens, num_rows - tokens, count).tolist()
            # The sum itself, or one that 64 bits would make it of.
            choices = [[row - first + wrap for wrap in (0, 2**64, -(2**64))] for row in sums]
            kept = [[n for n in each if -(2**63) <= n < 2**63] for each in choices]
            if first:
                self.where["positions"] = first
            offsets = np.array([each[rng.integers(len(each))] for each in kept], np.int64)
            offsets = held("seqlen_offsets", offsets, num_rows)
            return np.array([int(offset) + first for offset in offsets] + [None])[:-1]

        if kind == "offset":
            rows = np.arange(tokens).astype(object) + offsets_of(batch)[:, None]
            return np.vectorize(row_number, otypes=[np.int64])(rows)
        if "packed" in kind:
            num_sequences = int(rng.integers(1, 5))
            begins = np.sort(rng.integers(0, tokens + 1, num_sequences + 1))
            if case.outside == "inside":
                begins[0], begins[-1] = 0, tokens
            begins = held("cu_seqlens", begins, 0, str(rng.choice(INDEX)))
            offsets = np.zeros(num_sequences, np.int64)
            if "offset" in kind:
                offsets = offsets_of(num_sequences)
            return sequence_places(begins.tolist(), offsets.tolist(), tokens)
        axes, names = ((3,), kind[1:].split()[0]) if kind[0] == "3" else ((), kind)
        if axes and batch == 3 and names == "s":  # which could be meant for each batch
            names = "1s"
        shape = {"s": (tokens,), "bs": (batch, tokens), "1s": (1, tokens)}[names]
        if axes:
            num_pairs = case.head[1] // 2
            cuts = np.sort(rng.integers(0, num_pairs + 1, 2))
            section = np.diff([0, *cuts, num_pairs])
            if "mixed" in kind:
                own = rng.integers(0, [(num_pairs + 1) // 3 + 1, num_pairs // 3 + 1])
                section = [num_pairs - sum(own), *own]
            self.options["mrope_section"] = tuple(map(int, section))
            self.options["mrope_interleaved"] = "mixed" in kind
        shape = (*axes, *shape)
        return held("positions", rng.integers(0, num_rows, shape), num_rows)

    def beside(self, num_rows: int) -> np.ndarray:
        """Which tokens have a row that the table does not hold."""
        outside = (self.rows < 0) | (self.rows >= num_rows)
        return outside.any(0) if "mrope_section" in self.options else np.asarray(outside)

    def hold_heads(self, library: str, styles: list[Any]) -> list[Held]:
        """q, and k if any: numbers where the head is rotated, any bits at all where it is not."""
        case, rng, held = self.case, self._rng, []
        bits = FORMATS[case.dtype].bits
        batch, tokens, *heads = case.sizes
        for num_heads, style in zip(heads, styles, strict=True):
            shape = (batch, tokens, num_heads, case.head[0])
            numbers = np.ldexp(rng.standard_normal(shape), rng.integers(-3, 3, shape))
            noise = rng.integers(0, np.iinfo(bits).max, shape, bits, endpoint=True)
            # Where heads repeat each other or are normalised, noise would be rotated too.
            rotated = self.rotated | repeats(style) | (case.norm != "none")
            x = np.where(rotated, encode(numbers, case.dtype), noise)
            x = arranged(x, self.axes, flat=self.split is not None)
            units = (-1, self.split) if self.split else (self.axes.index("h"),)
            held.append(Held(x, case.dtype, library, place(x.shape, style, *units)))
        return held[: 2 if heads[1] else 1]

    def __call__(self, *xs: Any, out: Any = None, first: int = 0, **options: Any) -> list[Any]:
        """Rotate one array or two; the weights of a norm begin with the `first`."""
        two = len(xs) == 2
        weights, norm = [], {}
        if self.case.norm != "none":
            weights = [held.array for held in self.weights] or [None, None]
            norm = {"norm": self.case.norm, "eps": EPS, "weight_offset": WEIGHT_OFFSET}
            norm |= {"round_norm": self.case.round_norm, "norm_after": self.case.norm_after}
            biases = [held.array for held in self.biases[first : first + len(xs)]]
            norm |= dict(zip(("q_bias", "k_bias") if two else ("bias",), biases, strict=False))
            function = rope_cupy.apply_qk_norm_rotary if two else rope_cupy.apply_norm_rotary
        else:
            function = rope_cupy.apply_rotary_qk if two else rope_cupy.apply_rotary
        rotated = function(
            *xs,
            *weights[first : first + len(xs)],
            self.table,
            **self.where,
            layout=None if self.layout_is_plain(xs) else self.axes,
            head_dim=self.split,
            out=(tuple(out) if two else out[0]) if out else None,
            **norm,
            **self.options | options,
        )
        return list(rotated) if two else [rotated]

    def layout_is_plain(self, xs: tuple[Any, ...]) -> bool:
        """Whether the number of axes says which they are; of three not, where nothing is split."""
        shapes = [getattr(x, "array", x).shape for x in xs]
        one_head = all(len(shape) == 3 and shape[-1] == self.split for shape in shapes)
        return self.case.layout in DEFAULT_LAYOUTS and not one_head

    def exact(self, x: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The result for x (batch, tokens, heads, head_dim), and how far off it may be."""
        case, off = self.case, np.zeros(x.shape)
        if case.norm != "none" and not case.is_after:
            x, off = self.exactly_normalised(x, off, i, "between" if case.rotates else "last")
        if case.rotates:
            x, off = self.exactly_rotated(x, off)
        if case.is_after:
            if case.round_norm:
                x, off = self.with_rounding(x, off)
            x, off = self.exactly_normalised(x, off, i, "last")
        return x, off

    def with_rounding(self, x: np.ndarray, off: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and errors of what may be rounded the other way."""
        low, high = (rounded(x + sign * off, self.case.dtype) for sign in (-1, 1))
        with np.errstate(invalid="ignore"):  # of what is no number
            return rounded(x, self.case.dtype), np.abs(high - low)

    def exactly_normalised(
        self, x: np.ndarray, off: np.ndarray, i: int, place: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numbers normalised, and how far off they may be; the last ones are rounded later."""
        case = self.case
        error = 1e-14 if "float64" in (case.dtype, case.table_dtype) else NORM_ERROR
        axes = (2, 3) if case.norm == "heads" else 3
        if case.norm == "layer":
            y, centre = layer_normalised(x, EPS), np.mean(x, axis=3, keepdims=True)
        else:
            y, centre = normalised(x, None, EPS, 0.0, of_token=case.norm == "heads"), 0.0
        root = np.sqrt(np.mean((x - centre) ** 2, axis=axes, keepdims=True) + EPS)
        # An error of an element is one of the mean and of the root as well.
        mean_off = np.mean(off, axis=axes, keepdims=True) * (case.norm == "layer")
        root_off = np.mean(np.abs(x - centre) * off, axis=axes, keepdims=True) / root
        off = (off + mean_off + np.abs(y) * root_off + np.abs(centre) * error) / root
        x, off = y, off + np.abs(y) * error
        weight = decode(self.weights[i].elements, case.weights) if self.weights else None
        bias = decode(self.biases[i].elements, self.biases_dtype) if self.biases else None
        if case.round_norm == "before_weight":
            x, off = self.with_rounding(x, off)
        if weight is not None:
            factor = weight.reshape(-1, x.shape[3]) + WEIGHT_OFFSET
            # Nearly all of a weight may be taken away by the offset, but not of its rounding.
            of_factor = np.abs(factor) * error + np.abs(weight.reshape(factor.shape)) * error / 8
            x, off = x * factor, off * np.abs(factor) + np.abs(x) * of_factor
        if bias is not None:
            x, off = x + bias, off + (np.abs(x) + np.abs(bias)) * error
        if case.round_norm and place == "between":
            x, off = self.with_rounding(x, off)
        return x, off

    def exactly_rotated(self, x: np.ndarray, off: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers rotated, and how far off they may be: the errors of a pair are added up."""
        case, options = self.case, {**self.options}
        eager = options.pop("rounding") == "eager"
        options |= {"interleaved": case.interleaved, "second": self.angles.second}
        cos, sin = self.angles[:2]
        exact = rotate(x, cos, sin, positions=self.rows, **options)
        changes = self.rotated & (True if self.outside is None else ~self.outside[..., None, None])
        if eager:
            dtypes = case.dtype, case.table_dtype
            eagerly = rotate_eagerly(x, cos, sin, dtypes, positions=self.rows, **options)
            exact = np.where(changes, eagerly, exact)
            if case.form in ("complex", "frequencies") or off.any():
                # One product of complex numbers is not rounded on a GPU, and angles may be others.
                bits = FORMATS[case.dtype if case.dtype == case.table_dtype else "float32"]
                with np.errstate(invalid="ignore"):  # of what is not rotated
                    off = off + np.abs(x) * 2.0**-bits.mantissa_bits
        # Of two angles the cosine of one and the sine of the other may both be 1.
        most = np.sqrt(2) if case.form in TWO_ANGLES else 1
        error = 0.0
        if case.is_after and not eager:  # of sums and products, which are not rounded once yet
            error = 1e-15 if "float64" in (case.dtype, case.table_dtype) else 2e-7
        if case.form == "frequencies" and (case.is_after or FORMATS[case.dtype].tolerance is None):
            # Where a pair is rotated onto an axis, a result is next to nothing, and no nearer to it
            # than the angle's cosine and sine are.
            error += COMPUTED_ERROR
        if error or off.any():
            with np.errstate(invalid="ignore"):
                mixed = most * pair_norms(off[..., self.rotated], case.interleaved)
                mixed += error * most * pair_norms(x[..., self.rotated], case.interleaved)
            off = off.copy()
            off[..., self.rotated] = mixed
        return exact, off

    def untouched(self, shape: tuple[int, ...]) -> np.ndarray:
        """Which elements of a result keep their bits."""
        if self.case.norm != "none":
            return np.zeros(shape, bool)
        untouched = np.broadcast_to(~self.rotated, shape)
        if self.case.outside == "keep":
            untouched = untouched | self.outside[..., None, None]
        return untouched

    def canonical(self, bits: np.ndarray) -> np.ndarray:
        """An array as (batch, tokens, heads, head_dim)."""
        return canonical(bits, self.axes, self.split)


def verify(case: Case) -> list[Error]:
    """Make the call, hold all it did against the reference, and say how far each result is off.

    It is made twice, on other arrays that look the same: what has been seen goes a shorter way.
    """
    return _verify_once(case) + _verify_once(case)


def _verify_once(case: Case) -> list[Error]:
    call = Call(case)
    inputs, outs = call.inputs, call.inputs if case.write == "in place" else []
    if case.write.startswith("out"):
        library = able(OTHER[case.library], case.dtype) if "other" in case.write else case.library
        styles = [known(style, library, written=True) for style in call.styles[::-1]]
        outs = call.hold_heads(library, styles)
    results = call(*(held.array for held in inputs), out=[held.array for held in outs])

    errors = []
    for i, y in enumerate(results):
        if outs:
            assert y is outs[i].array
            outs[i].assert_guarded()
        else:
            assert type(y) is type(inputs[i].array)
            assert repeats(call.styles[i]) or in_order_of(y, inputs[i].array)
        x, y = (call.canonical(bits) for bits in (inputs[i].elements, to_bits(y)))
        exact, off = call.exact(decode(x, case.dtype), i)
        rotated, repeated = call.rotated, repeats(call.styles[i])
        actual = decode(y, case.dtype)
        parts = [(actual[..., rotated], exact[..., rotated], off[..., rotated])]
        if case.norm != "none" and not rotated.all():
            parts.append((actual[..., ~rotated], exact[..., ~rotated], off[..., ~rotated]))
        for actual, exact, off in parts:
            near = (rounded(exact - off, case.dtype) <= actual) & (
                actual <= rounded(exact + off, case.dtype)
            )
            errors.append(
                check(actual, np.where(near & (off > 0), actual, exact), case.dtype, repeated)
            )
        untouched = call.untouched(y.shape)
        assert np.array_equal(x[untouched], y[untouched]), "what is not rotated must keep its bits"
    for unwritten in call.held if case.write == "in place" else call.held + inputs:
        unwritten.assert_unchanged()
    return errors
