"""Shared by the builders of models' tables: grids, checks of sizes, float32 in a model's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import computed, describe, is_kind_of_array, library_of, placed
from .checks import described, index, positive
from .choices import COMPUTE_DTYPES, ComputeDtype
from .frequencies import axial
from .tables import RotaryTable

Positions = NDArray[np.float64]  # (..., tokens, axes)


def table_of(
    positions: Positions,
    dims: Sequence[int],
    base: float,
    like: Any,
    compute_dtype: ComputeDtype,
    *,
    on_host: bool = False,
    angle_dtype: ComputeDtype = "float32",
) -> RotaryTable:
    """Return the table of positions.

    In float32 it is computed as diffusers does: with `on_host` on the CPU and by polar coordinates,
    from angles of `angle_dtype`.
    """
    base, axes = positive("base", base), positions.shape[-1]
    if len(_dims(dims)) != axes:
        raise ValueError(f"dims must be {axes} even ints, one for each axis, got {dims}")
    if is_exact(compute_dtype):
        return RotaryTable.from_angles(axial(positions, dims, base), like=like)
    axial(positions[..., :0, :], dims, base)  # refuses dims that are not positive and even

    def cos_and_sin(module: Any, positions: Any, *steps: Any) -> tuple[Any, Any]:
        sizes = zip(steps, dims, strict=True)
        frequencies = [_inverse(base, step, dim) for step, dim in sizes]
        return _cos_and_sin(module, positions, frequencies, by_polar=on_host)

    steps = [np.arange(0, dim, 2).astype(angle_dtype) for dim in dims]
    arrays = [positions.astype(angle_dtype), *steps]
    return RotaryTable(*computed_in_order(cos_and_sin, arrays, like, on_host))


def qwen_positions(
    grids: Sequence[tuple[int, tuple[int, ...]]],
    text_length: int,
    scale_rope: bool,
    text_from: int = 0,
) -> Positions:
    """Return the positions of a text, then of images, each given by its first frame and size."""
    text_start, share, images = text_from, 2 if scale_rope else 1, []
    for frame, (frames, height, width) in grids:
        text_start = max(text_start, height // share, width // share)
        top, left = ((height + 1) // 2, (width + 1) // 2) if scale_rope else (0, 0)
        images.append(grid_of((frames, height, width), start=(frame, -top, -left)))
    text = np.repeat(text_start + np.arange(text_length, dtype=np.float64), 3).reshape(-1, 3)
    return np.concatenate([text, *images])


def _inverse(base: float, steps: Any, dim: int) -> Any:
    return 1.0 / base ** (steps / dim)


def frequencies_on_host(dim: int, base: float, like: Any) -> NDArray[np.float32]:
    steps = np.arange(0, dim, 2, dtype=np.float32)
    base = positive("base", base)
    (frequencies,) = computed_in_order(
        lambda _, steps: (_inverse(base, steps, dim),), [steps], like, on_host=True
    )
    return _downloaded(frequencies, like)


def float32_table(positions: Positions, frequencies: Sequence[Any], like: Any) -> RotaryTable:
    arrays = [positions.astype(np.float32), *frequencies]
    return RotaryTable(
        *computed_in_order(lambda module, at, *of: _cos_and_sin(module, at, of), arrays, like)
    )


def _cos_and_sin(
    module: Any, positions: Any, frequencies: Sequence[Any], by_polar: bool = False
) -> tuple[Any, Any]:
    """Return float32 cos and sin of the angles of every axis, one axis after another."""
    axes = enumerate(frequencies)
    angles = module.concatenate([positions[..., axis, None] * pairs for axis, pairs in axes], -1)
    angles = module.asarray(angles, dtype=module.float32)
    if by_polar and _is_torch(module):  # its cos and sin give other bits than its polar
        turns = module.polar(module.ones_like(angles), angles)
        return turns.real, turns.imag
    return module.cos(angles), module.sin(angles)


def computed_in_order(
    function: Callable[..., tuple[Any, ...]],
    arrays: Sequence[NDArray[Any]],
    like: Any,
    on_host: bool = False,
) -> tuple[Any, ...]:
    """Return the results of function(module, *arrays), computed on the device of `like`.

    With `on_host`, PyTorch computes them on the CPU.
    """
    if not on_host:
        return computed(function, arrays, like)

    def there(module: Any) -> tuple[Any, ...]:
        with module.device("cpu") if _is_torch(module) else nullcontext():
            return function(module, *map(module.asarray, arrays))

    results = computed(there, (), like)
    return tuple(placed(_downloaded(result, like), like) for result in results)


def _downloaded(array: Any, like: Any) -> NDArray[np.float32]:
    return np.array(library_of("like", like).download(array), np.float32)


def _is_torch(module: Any) -> bool:
    return bool(module.__name__ == "torch")


def spread_of(ends: Sequence[tuple[float, float, int]], like: Any, exact: bool) -> list[Any]:
    """Return evenly spaced numbers for each (first, last, size)."""
    if exact:
        return [np.linspace(*axis) for axis in ends]
    axes = computed_in_order(
        lambda module: tuple(module.linspace(*axis, dtype=module.float32) for axis in ends),
        [],
        like,
    )
    return [_downloaded(axis, like) for axis in axes]


def crop_of(
    height: int, width: int, base_height: int, base_width: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return (size of the crop, tokens, size of the base) for height and width.

    The crop is the largest part of the base that has the aspect ratio of height by width.
    """
    if height / width > base_height / base_width:
        crop = base_height, round(base_height / height * width)
    else:
        crop = round(base_width / width * height), base_width
    return (crop[0], height, base_height), (crop[1], width, base_width)


def grid_of(size: Sequence[int], start: Sequence[int] | int = 0) -> Positions:
    """Return the points of a grid, (tokens, axes), the last axis fastest."""
    return np.indices(size, np.float64).reshape(len(size), -1).T + start


def positions_of_ids(ids: Any, dims: Sequence[int]) -> Positions:
    positions, axes = numbers_of("ids", ids)[0], len(_dims(dims))
    if positions.ndim not in (2, 3) or positions.shape[-1] != axes:
        raise ValueError(
            f"ids must have the shape (tokens, {axes}) or (batch, tokens, {axes}), got "
            f"{positions.shape}"
        )
    return positions


def _dims(dims: Any) -> Sequence[int]:
    if not isinstance(dims, list | tuple) or not dims:
        raise TypeError(f"dims must be a tuple of ints, one for each axis, got {dims!r}")
    return dims


def sizes_of(
    name: str, values: Any, axes: int, at_most: int | None = None
) -> list[tuple[int, ...]]:
    """Return one grid of `axes` ints, or several, as a list."""
    sizes, are_ints = numbers_of(name, values)
    rows = sizes[None] if sizes.ndim == 1 else sizes
    wanted = f"{axes} ints of 1 or more" + ("" if at_most else ", or rows of these")
    if sizes.size and not are_ints:
        raise TypeError(f"{name} must be {wanted}, got {values!r}")
    if rows.ndim != 2 or rows.shape[1] != axes or not rows.size or (rows < 1).any():
        raise ValueError(f"{name} must be {wanted}, got {values!r}")
    if at_most and len(rows) > at_most:
        raise ValueError(f"{name} must be {wanted}, got {len(rows)} rows")
    return [tuple(map(int, row)) for row in rows]


def three_of(name: str, values: Any) -> list[float]:
    numbers = numbers_of(name, values)[0]
    if numbers.shape != (3,):
        raise ValueError(f"{name} must be 3 numbers, got shape {numbers.shape}")
    return [float(number) for number in numbers]


def numbers_of(name: str, values: Any) -> tuple[Positions, bool]:
    """Return an array or nested sequences as float64, and whether the numbers were ints."""
    if is_kind_of_array(type(values)):  # type: ignore[arg-type]
        dtype = describe(name, values).spec.dtype
        array = np.asarray(library_of(name, values).download(values))
    else:
        try:
            array = np.asarray(values)
        except (TypeError, ValueError):  # of unequal lengths
            array = np.array(None)
        dtype = array.dtype.name
    if not dtype.startswith(("int", "uint", "float", "bfloat")):
        raise TypeError(f"{name} must be real numbers, got {described(values)}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got an infinity or NaN")
    return array, "int" in dtype


def head_size(value: Any, multiple: int, at_least: int = 1) -> int:
    number = index("head_dim", value)
    if number < at_least or number % multiple:
        wanted = f"a multiple of {multiple}, {max(at_least, multiple)} or more"
        raise ValueError(f"head_dim must be {wanted}, got {number}")
    return number


def is_exact(compute_dtype: Any) -> bool:
    if compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(
            f'compute_dtype must be "float64" or "float32", got {described(compute_dtype)}'
        )
    return bool(compute_dtype == "float64")


def check_dims(dims: Any, axes: int) -> None:
    if not isinstance(dims, list | tuple):
        raise TypeError(f"dims must be a tuple of {axes} even ints, got {dims!r}")
    if len(dims) != axes:
        raise ValueError(f"dims must be {axes} even ints, one for each axis, got {dims}")
