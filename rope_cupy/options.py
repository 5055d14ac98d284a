"""Options: the keyword arguments of a call that are not arrays, and their checks. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .checks import MOST_FLOAT32, as_float, check_number, choice, count, described, index
from .choices import (
    BEFORE_WEIGHT,
    CACHE_DTYPES,
    CACHE_LAYOUTS,
    LAYOUTS,
    NORMS,
    OUT_OF_RANGE,
    ROUNDINGS,
)

DEFAULT_LAYOUTS = {3: "shd", 4: "bshd"}
NUM_AXES = 3  # of positions with mrope_section
QKV = "q", "k", "v"
# What must be left as it is where there is no table to give it a meaning.
WITHOUT_TABLE: dict[str, Any] = {
    "interleaved": None,
    "rotary_offset": 0,
    "conjugate": False,
    "mrope_section": None,
    "mrope_interleaved": False,
}
NO_PARTS = None, None, None  # the last of Options, of a call that only rotates
LEAST_SCALE = 2.0**-126  # whose reciprocal is a float32
Part = TypeVar("Part")  # of Options


class Norm(NamedTuple):
    """RMSNorm or LayerNorm of q and k, before they are rotated or after it."""

    kind: str  # one of NORMS
    eps: float
    weight_offset: float
    round_norm: bool | str  # or BEFORE_WEIGHT
    after: bool = False

    @property
    def num_roundings(self) -> int:
        """How often what is normalised is rounded to q's dtype, before weights and behind them."""
        return 2 if self.round_norm == BEFORE_WEIGHT else int(self.round_norm)


class Packed(NamedTuple):
    """The heads of one array that holds q, k and v."""

    num_heads: int
    num_kv_heads: int


class Cache(NamedTuple):
    """Caches that k and v are written to."""

    layout: str  # one of CACHE_LAYOUTS
    dtype: str | None  # what uint8 elements are
    k_scale: float
    v_scale: float


class Options(NamedTuple):
    """The keyword arguments of a call that are not arrays."""

    interleaved: bool | None  # None for the table's own pairing
    layout: str | None
    head_dim: int | None
    rotary_offset: int
    conjugate: bool
    out_of_range: str
    mrope_section: tuple[int, int, int] | None
    mrope_interleaved: bool
    rounding: str = "once"
    norm: Norm | None = None
    packed: Packed | None = None
    cache: Cache | None = None


Parts = tuple[Norm | None, Packed | None, Cache | None]  # the last of Options


def check_options(
    interleaved: object,
    layout: object,
    head_dim: object,
    rotary_offset: object,
    conjugate: object,
    out_of_range: object,
    mrope_section: object,
    mrope_interleaved: object,
    rounding: object = "once",
    *,
    parts: Parts = NO_PARTS,
) -> Options:
    """Check what needs no array of the fields of Options; `check_parts` has checked the parts."""
    if not isinstance(interleaved, bool | None):
        raise TypeError(f"interleaved must be None, True or False, got {interleaved!r}")
    if not isinstance(conjugate, bool):
        raise TypeError(f"conjugate must be True or False, got {conjugate!r}")
    if not isinstance(layout, str | None):
        raise TypeError(f"layout must be a string of axis names or None, got {layout!r}")
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(
            "layout must name the axes b (optional), s or t, and h in any order, then d, such as "
            f"'bshd', 'bhsd', 'sbhd', 'shd' or 'thd', got {layout!r}"
        )
    head_dim = None if head_dim is None else index("head_dim", head_dim)
    if head_dim is not None and head_dim <= 0:
        raise ValueError(f"head_dim must be positive, got {head_dim}")
    if head_dim is not None and layout is not None and layout[-2:] != "hd":
        raise ValueError(
            f"layout must end in 'hd' where head_dim splits the last axis, got {layout!r}"
        )
    out_of_range = choice("out_of_range", out_of_range, OUT_OF_RANGE)
    offset = index("rotary_offset", rotary_offset)
    if not isinstance(mrope_interleaved, bool):
        raise TypeError(f"mrope_interleaved must be True or False, got {mrope_interleaved!r}")
    sections = _checked_sections(mrope_section)
    if mrope_interleaved and sections is None:
        raise ValueError("mrope_section must be given with mrope_interleaved=True, got None")
    rounding = choice("rounding", rounding, ROUNDINGS)
    return Options(
        interleaved,
        None if layout is None else "".join(layout),  # no longer of an enumeration of strings
        head_dim,
        offset,
        conjugate,
        out_of_range,
        sections,
        mrope_interleaved,
        rounding,
        *parts,
    )


def check_without_table(names: tuple[str, ...], interleaved: object, options: Options) -> None:
    """Refuse a call without a table of which nothing else is asked, or what a table alone gives a
    meaning. `interleaved` is what the call was given.
    """
    copies = len(names) == len(QKV) and options.cache is None  # as a stream of `join_qkv` may be
    if options.norm is None and not copies:
        raise TypeError(
            "table must be a RotaryTable or a tuple (cos, sin) where there is no norm, got None"
        )
    given = options._asdict() | {"interleaved": interleaved}
    for name, default in WITHOUT_TABLE.items():
        if given[name] != default:
            raise ValueError(f"{name} must be {default} without a table, got {given[name]!r}")


def _checked_sections(mrope_section: object) -> tuple[int, int, int] | None:
    if mrope_section is None:
        return None
    if not isinstance(mrope_section, tuple | list) or len(mrope_section) != NUM_AXES:
        raise TypeError(f"mrope_section must be None or three ints, got {described(mrope_section)}")
    first, second, third = (index("mrope_section", each, "three ints") for each in mrope_section)
    if min(first, second, third) < 0:
        raise ValueError(f"mrope_section must be of 0 or more pairs, got {mrope_section}")
    return first, second, third


def _remembered(check: Callable[..., Part]) -> Callable[..., Part]:
    """Remember what a check returns, but for what cannot be hashed, which is refused by name."""
    known = lru_cache(maxsize=256, typed=True)(check)

    @wraps(check)
    def checked(*fields: Any) -> Part:
        try:
            return known(*fields)
        except TypeError:  # one of a wrong type
            return check(*fields)

    return checked


def check_parts(norm: Any, packed: Any, cache: Any) -> tuple[Any, Any, Any]:
    """Check the last three of Options, each None or a tuple of its fields."""
    return (
        None if norm is None else check_norm(*norm),
        None if packed is None else check_packed(*packed),
        None if cache is None else check_cache(*cache),
    )


def check_round_norm(round_norm: object) -> None:
    """Refuse what does not say where what is normalised is rounded."""
    if not isinstance(round_norm, bool | str):
        raise TypeError(
            f"round_norm must be True, False or {BEFORE_WEIGHT!r}, got {described(round_norm)}"
        )
    if not (isinstance(round_norm, bool) or round_norm == BEFORE_WEIGHT):
        raise ValueError(f"round_norm must be True, False or {BEFORE_WEIGHT!r}, got {round_norm!r}")


def check_norm_after(norm_after: object) -> None:
    """Refuse what does not say whether a norm comes after the rotation."""
    if not isinstance(norm_after, bool):
        raise TypeError(f"norm_after must be True or False, got {described(norm_after)}")


@_remembered
def check_norm(
    norm: object, eps: Any, weight_offset: Any, round_norm: Any, norm_after: object = False
) -> Norm:
    """Check the fields of Norm."""
    kind = choice("norm", norm, NORMS)
    check_round_norm(round_norm)
    check_norm_after(norm_after)
    eps, weight_offset = _number("eps", eps), _number("weight_offset", weight_offset)
    if eps < 0:
        raise ValueError(f"eps must be 0 or more, got {eps}")
    for name, number in (("eps", eps), ("weight_offset", weight_offset)):
        if abs(number) > MOST_FLOAT32:
            raise ValueError(
                f"{name} must be at most {MOST_FLOAT32:.6g}, the largest float32, got {number}"
            )
    is_bool = isinstance(round_norm, bool)
    rounds = round_norm if is_bool else BEFORE_WEIGHT
    return Norm(kind, eps, weight_offset, rounds, norm_after is True)


@_remembered
def check_packed(num_heads: object, num_kv_heads: object) -> Packed:
    """Check the fields of Packed."""
    return Packed(count("num_heads", num_heads, 1), count("num_kv_heads", num_kv_heads, 1))


@_remembered
def check_cache(layout: object, dtype: object, k_scale: Any, v_scale: Any) -> Cache:
    """Check the fields of Cache, of which scales are numbers, or None for 1."""
    layout = choice("cache_layout", layout, CACHE_LAYOUTS)
    dtype = None if dtype is None else choice("cache_dtype", dtype, CACHE_DTYPES)
    scales = []
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        number = 1.0 if scale is None else _number(name, scale)
        if not LEAST_SCALE <= number <= 1 / LEAST_SCALE:
            raise ValueError(f"{name} must be from 2^-126 to 2^126, got {scale}")
        scales.append(float(np.float32(number)))  # as in memory
    return Cache(layout, dtype, *scales)


def _number(name: str, value: Any) -> float:
    check_number(name, value)
    number = as_float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def axis_names(rank: int, options: Options) -> str:
    """Return the names of an array's axes, "h" for a last one that head_dim splits, t as s."""
    return names_of_axes(rank, options.layout, options.head_dim is not None)


def names_of_axes(rank: int, layout: str | None, splits: bool) -> str:
    """Return the names of an array's axes; the last one holds all heads where that `splits`."""
    layout = layout or DEFAULT_LAYOUTS.get(rank + splits, "")
    return layout.replace("t", "s")[: -1 if splits else None]
