"""The strings that options take, as types: an editor completes them, a type checker refuses others.

Each tuple of strings is read from its type, so every string is written once.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Layout: TypeAlias = Literal[
    "bshd",
    "bhsd",
    "sbhd",
    "shbd",
    "hbsd",
    "hsbd",
    "shd",
    "hsd",
    "bthd",
    "bhtd",
    "tbhd",
    "thbd",
    "hbtd",
    "htbd",
    "thd",
    "htd",
]
"""The axes of an array in order: b (batches), s or t (tokens), h (heads) and d (head elements)."""

OutOfRange: TypeAlias = Literal["nan", "keep"]
"""What becomes of a token that the table has no row for: NaN, or what it was."""

Rounding: TypeAlias = Literal["once", "eager"]
"""Whether the result is rounded once, or after each operation, as PyTorch does eagerly."""

NormKind: TypeAlias = Literal["head", "heads", "layer"]
"""RMSNorm of each head, RMSNorm of all heads of a token, or LayerNorm of each head."""

BeforeWeight: TypeAlias = Literal["before_weight"]
"""The norm is rounded before it is multiplied by its weights, and after it too."""

RoundNorm: TypeAlias = bool | BeforeWeight
"""Whether the norm is rounded before the rotation, and whether before its weights too."""

CacheLayout: TypeAlias = Literal["NHD", "HND"]
"""The order of slots (N), heads (H) and head elements (D) in a cache."""

CacheDtype: TypeAlias = Literal["float8_e4m3fn", "float8_e5m2"]
"""The numbers that the bytes of a uint8 cache are."""

TableAxes: TypeAlias = Literal["p", "s", "bs", "sh", "bsh"]
"""The axes of a table before its last: p (positions), b (batches), s (tokens) and h (heads)."""

ComputeDtype: TypeAlias = Literal["float64", "float32"]
"""The dtype that the table of a model is computed in."""

Scheme: TypeAlias = Literal["contiguous", "zigzag"]
"""How the tokens of a sequence are shared among processes."""

LAYOUTS: tuple[str, ...] = get_args(Layout)
OUT_OF_RANGE: tuple[str, ...] = get_args(OutOfRange)
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
NORMS: tuple[str, ...] = get_args(NormKind)
HEAD_NORM, TOKEN_NORM, LAYER_NORM = NORMS
(BEFORE_WEIGHT,) = get_args(BeforeWeight)
CACHE_LAYOUTS: tuple[str, ...] = get_args(CacheLayout)
CACHE_DTYPES: tuple[str, ...] = get_args(CacheDtype)
TABLE_AXES: tuple[str, ...] = get_args(TableAxes)
COMPUTE_DTYPES: tuple[str, ...] = get_args(ComputeDtype)
SCHEMES: tuple[str, ...] = get_args(Scheme)
