"""What a call computes, in sizes, strides and flags, and every check of its arrays. Pure."""

from __future__ import annotations

from .arrays import check_dtype, out_names, output_names
from .axes import check_inputs
from .build import rotary_problem
from .records import (
    ANY_POSITION,
    BY_ELEMENT,
    FREQUENCY,
    GIVEN,
    IMPLICIT,
    INTERLEAVED_MROPE,
    MATRICES,
    MAX_ROWS,
    OF_POSITIONS,
    OF_WEIGHTS,
    OFFSET,
    ONE_ANGLE,
    PACKED,
    POINTER_OF,
    SECTIONED_MROPE,
    TOKEN_INDEX,
    CacheProblem,
    NormProblem,
    Pointers,
    RotaryProblem,
    RotaryTensor,
    TableSpec,
    View,
)
from .table import implicit_position

__all__ = [
    "ANY_POSITION",
    "BY_ELEMENT",
    "FREQUENCY",
    "GIVEN",
    "IMPLICIT",
    "INTERLEAVED_MROPE",
    "MATRICES",
    "MAX_ROWS",
    "OFFSET",
    "OF_POSITIONS",
    "OF_WEIGHTS",
    "ONE_ANGLE",
    "PACKED",
    "POINTER_OF",
    "SECTIONED_MROPE",
    "TOKEN_INDEX",
    "CacheProblem",
    "NormProblem",
    "Pointers",
    "RotaryProblem",
    "RotaryTensor",
    "TableSpec",
    "View",
    "check_dtype",
    "check_inputs",
    "implicit_position",
    "out_names",
    "output_names",
    "rotary_problem",
]
