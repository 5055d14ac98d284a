"""RotaryKernel: the template arguments of the kernel in kernels/rotary.cu, by their names. Pure."""

from __future__ import annotations

from typing import NamedTuple

from .problem import (
    BY_ELEMENT,
    FREQUENCY,
    GIVEN,
    IMPLICIT,
    INTERLEAVED_MROPE,
    MATRICES,
    NO_TABLE,
    OFFSET,
    PACKED,
    SECTIONED_MROPE,
    TOKEN_INDEX,
    RotaryProblem,
)

C_TYPES = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float",
    "float64": "double",
    FREQUENCY: "frequency",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "int32": "int",
    "int64": "long long",
    None: "void",
}
POSITION_TYPES = {
    OFFSET: "Offset",
    SECTIONED_MROPE: "SectionedMrope",
    INTERLEAVED_MROPE: "InterleavedMrope",
}


class RmsNorm(NamedTuple):
    """The template arguments of RmsNorm in kernels/norm.cuh."""

    weight: str
    token_threads: int
    span: int
    cross_warp: bool
    roundings: int
    apart: bool


class LayerNorm(NamedTuple):
    """The template arguments of LayerNorm in kernels/norm.cuh."""

    weight: str
    span: int
    cross_warp: bool
    roundings: int


class AfterRotation(NamedTuple):
    """The template argument of AfterRotation in kernels/norm.cuh."""

    norm: RmsNorm | LayerNorm


class RotaryKernel(NamedTuple):
    """The template arguments of rotary_kernel, named and ordered as there."""

    t: str
    table: str
    position: str
    norm: RmsNorm | LayerNorm | AfterRotation | str
    destination: str
    tensors: int
    interleaved: bool
    conjugate: bool
    eager: bool
    rows: int
    pairs: int
    form: str
    copy_width: int
    in_place: bool
    past_l1: bool
    common: bool
    members: int = 1  # launches that are run as one

    @property
    def name(self) -> str:
        """The kernel's name in C++."""
        return instance("rotary_kernel", *self)


def instance(template: str, *arguments: object) -> str:
    """Return the C++ name of a template with its arguments."""
    return f"{template}<{', '.join(map(_argument, arguments))}>"


def _argument(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return instance(type(value).__name__, *value) if isinstance(value, tuple) else str(value)


def position_type(problem: RotaryProblem) -> str:
    """Return the type of positions: see kernels/positions.cuh."""
    index, kind = C_TYPES[problem.position_dtype], problem.position_kind
    if kind in (IMPLICIT, GIVEN):
        return index
    if kind == TOKEN_INDEX:
        return "TokenIndex"
    if kind == PACKED:
        begins = C_TYPES[problem.cu_dtype]
        return instance("Packed", begins if problem.position_dtype is None else index, begins)
    return instance(POSITION_TYPES[kind], index)


def form_type(problem: RotaryProblem) -> str:
    """Return the type of the table's form: see kernels/angles.cuh."""
    if problem.table_form == NO_TABLE:
        return "NoTable"
    if problem.table_form == BY_ELEMENT:
        return "ByElement"
    if problem.table_form == MATRICES:
        return instance("Matrices", problem.table_step)
    return instance("OneAngle", problem.table_step, problem.sin_offset)


def destination_type(problem: RotaryProblem) -> str:
    """Return the type of what is written to: see kernels/destinations.cuh."""
    if problem.cache is None:
        return "Outputs"
    dtypes = problem.cache.slot_dtype, problem.cache.dtype, problem.cache.scale_dtype
    template = "Slots" if problem.k_out is None else "SlotsAndK"
    return instance(template, *(C_TYPES[dtype] for dtype in dtypes))
