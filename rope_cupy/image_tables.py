"""Tables of more image models and of vision encoders, which `rope_cupy.diffusion` offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import placed
from .checks import count, positive
from .choices import ComputeDtype
from .frequencies import axial, axial_from_config
from .model_tables import (
    check_dims,
    computed_in_order,
    grid_of,
    head_size,
    is_exact,
    sizes_of,
    table_of,
)
from .tables import RotaryTable


def cogview4(
    grid: Any,
    *,
    like: Any,
    text_length: int = 0,
    base_size: tuple[int, int] = (256, 256),
    head_dim: int = 128,
    base: float = 10000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of CogView 4 from its grid (height, width), for ``interleaved=False``.

    Every image is spread over `base_size` in whole steps: row y of the grid has the position
    y * base_size[0] // height, and column x the position x * base_size[1] // width. Height and
    width rotate half of the head each. The default of `head_dim` is that of CogView 4 6B.

    The text precedes the image in the model's joint attention and is not rotated. `text_length`
    prepends that many rows of angle 0. diffusers computes in float32, on the CPU.

    >>> import numpy as np
    >>> cogview4((4, 6), like=np.zeros(1), text_length=8)
    RotaryTable(shape=(32, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    half, base = head_size(head_dim, 4) // 2, positive("base", base)
    (size,) = sizes_of("grid", grid, 2, at_most=1)
    (whole,) = sizes_of("base_size", base_size, 2, at_most=1)
    image = grid_of(size) * whole // size
    positions = np.concatenate([np.zeros((count("text_length", text_length), 2)), image])
    if is_exact(compute_dtype):
        return RotaryTable.from_angles(axial(positions, (half, half), base), like=like)

    def cos_and_sin(module: Any, positions: Any, steps: Any) -> tuple[Any, Any]:
        frequencies = 1.0 / base ** (steps / half)
        angles = (positions[..., None] * frequencies).reshape(len(positions), half)
        return module.cos(angles), module.sin(angles)

    arrays = [positions.astype(np.float32), np.arange(0, half, 2, dtype=np.float32)]
    return RotaryTable(*computed_in_order(cos_and_sin, arrays, like, on_host=True))


def hunyuan_image(
    grid: Any,
    *,
    like: Any,
    text_length: int = 0,
    dims: Sequence[int] = (64, 64),
    base: float = 256.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of HunyuanImage 2.1 from its grid (height, width).

    With three `dims` the grid is (frames, height, width), as in the model's refiner.

    The text follows the image in the model's joint attention and is not rotated. `text_length`
    appends that many rows of angle 0. diffusers computes in float32.

    >>> import numpy as np
    >>> hunyuan_image((4, 6), like=np.zeros(1), text_length=8)
    RotaryTable(shape=(32, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    check_dims(dims, 3 if isinstance(dims, list | tuple) and len(dims) == 3 else 2)
    (size,) = sizes_of("grid", grid, len(dims), at_most=1)
    still = np.zeros((count("text_length", text_length), len(dims)))
    return table_of(np.concatenate([grid_of(size), still]), dims, base, like, compute_dtype)


def ernie_image(
    grid: Any,
    text_length: Any,
    *,
    like: Any,
    dims: Sequence[int] = (32, 48, 48),
    base: float = 256.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of ERNIE-Image, for ``interleaved=False``: rows of the image, then the text.

    `grid` is (height, width), and `text_length` the number of tokens of the text. The image has the
    time `text_length`, and the tokens of the text have the times before it.

    Where the texts of a batch differ in length, `text_length` is a sequence of lengths. The table
    then has rows by batch, with as many rows of text as the longest text has tokens.

    The two elements of a pair have different angles, of neighbouring frequencies, because the model
    repeats every angle at once and then pairs halves: see `RotaryTable.from_elementwise`. diffusers
    computes in float32 and rounds the table to the dtype of q.

    >>> import numpy as np
    >>> ernie_image((4, 6), 8, like=np.zeros(1))
    RotaryTable(shape=(32, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    several = isinstance(text_length, list | tuple)
    if several and not text_length:
        raise ValueError(f"text_length must be an int or a sequence of them, got {text_length}")
    lengths = [count("text_length", each) for each in (text_length if several else [text_length])]
    (size,) = sizes_of("grid", grid, 2, at_most=1)
    text = grid_of((max(lengths), 1, 1))
    rows = [np.concatenate([grid_of((1, *size), (length, 0, 0)), text]) for length in lengths]
    positions, base = np.stack(rows) if several else rows[0], positive("base", base)
    check_dims(dims, 3)
    angles = np.repeat(axial(positions, dims, base), 2, -1)
    if sum(dims) % 4:
        raise ValueError(f"dims must have a sum that 4 divides, got {dims}")
    if is_exact(compute_dtype):
        halves = [of(angles).astype(np.float32) for of in (np.cos, np.sin)]
        return RotaryTable.from_elementwise(*(placed(half, like) for half in halves))

    def cos_and_sin(module: Any, positions: Any, *steps: Any) -> tuple[Any, Any]:
        angles = []
        for axis, (step, dim) in enumerate(zip(steps, dims, strict=True)):
            angles.append(positions[..., axis, None] * (1.0 / base ** (step / dim)))
        once = module.concatenate(angles, -1)
        twice = module.stack([once, once], -1).reshape(*once.shape[:-1], -1)
        return module.cos(twice), module.sin(twice)

    steps = [np.arange(0, dim, 2, dtype=np.float32) for dim in dims]
    arrays = [positions.astype(np.float32), *steps]
    return RotaryTable.from_elementwise(*computed_in_order(cos_and_sin, arrays, like))


def qwen_image21(
    grids: Any,
    text_lengths: Any,
    *,
    like: Any,
    dims: Sequence[int] = (16, 56, 56),
    base: float = 10000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of Qwen-Image 2.1, whose sequence alternates texts and images.

    `grids` is one (1, height, width), or several, diffusers' img_shapes: the images to edit, and
    last the image to make. `text_lengths` has the number of tokens of the text before each image,
    and may have one number more, for the text after the last image. An int is the length of the
    text before a single image.

    A token of text advances the position on all three axes by 1. An image has the position that is
    reached as its frame, and height and width centred at 0. It advances the position by its height
    or its width, whichever is larger. diffusers computes in float32, on the CPU.

    >>> import numpy as np
    >>> qwen_image21([(1, 4, 6), (1, 8, 8)], (20, 9), like=np.zeros(1))
    RotaryTable(shape=(117, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    sizes = sizes_of("grids", grids, 3)
    if any(frames != 1 for frames, _, _ in sizes):
        raise ValueError(f"grids must be of one frame each, got {sizes}")
    given = text_lengths if isinstance(text_lengths, list | tuple) else [text_lengths]
    lengths = [count("text_lengths", length) for length in given]
    if not 0 <= len(lengths) - len(sizes) <= 1:
        raise ValueError(
            f"text_lengths must be {len(sizes)} ints, one for each grid, or one more, got "
            f"{len(lengths)}"
        )
    position, rows = 0, [np.zeros((0, 3))]
    for index, length in enumerate(lengths):
        rows.append(grid_of((length,), start=position).repeat(3, -1))
        position += length
        if index < len(sizes):
            _, height, width = sizes[index]
            start = (position, height // 2 - height, width // 2 - width)
            rows.append(grid_of(sizes[index], start=start))
            position += max(height, width)
    return table_of(np.concatenate(rows), dims, base, like, compute_dtype, on_host=True)


def vision_encoder(config: Any, grids: Any, *, like: Any, merge_size: int = 1) -> RotaryTable:
    """Return the table of a vision encoder of transformers, from its config or its dict.

    `rope_cupy.frequencies.axial_from_config` says which models are known. Pass the `interleaved` of
    its result to the function that rotates. `grids` is one (frames, height, width) in patches, or
    several, such as image_grid_thw; the rows of the grids follow one another. The patches of a
    frame are in the order of rows, or with a `merge_size` in blocks of `merge_size` by
    `merge_size`. Encoders with a `spatial_merge_size` in their config have blocks, except Kimi
    K2.5, PaddleOCR-VL and Step 3. Qwen2.5-VL reorders its tokens by windows afterwards: reorder
    these rows too. Tokens that stand for no patch, such as a class token, have no row.

    transformers computes in float32. This function computes in float64 and rounds once.

    Raises TypeError or ValueError if an argument is not what its docstring says, for Gemma 4, which
    rotates slices of its heads, and for the text model of Ernie 4.5 VL, which is not an encoder.

    >>> import numpy as np
    >>> config = {"model_type": "qwen3_vl_vision", "head_dim": 72}
    >>> vision_encoder(config, [(1, 4, 6), (2, 2, 2)], like=np.zeros(1), merge_size=2)
    RotaryTable(shape=(32, 36), rotary_dim=72, dtype='float32', device='cpu')
    """
    rotation = axial_from_config(config)
    if rotation.num_slices != 1:
        raise ValueError(
            "config must be of a model that rotates whole heads, got one of "
            f"{rotation.num_slices} slices"
        )
    if rotation.interleaved and rotation.names[0] == "time":
        raise ValueError("config must be of a vision encoder, got one of a text model")
    merge_size, angles = count("merge_size", merge_size, at_least=1), []
    for frames, height, width in sizes_of("grids", grids, 3):
        if height % merge_size or width % merge_size:
            raise ValueError(
                f"grids must have heights and widths that merge_size={merge_size} divides, got "
                f"{height} by {width}"
            )
        size = (frames, height, width) if len(rotation.names) == 3 else (height, width)
        blocks = -1, height // merge_size, merge_size, width // merge_size, merge_size
        image = rotation.angles(size).reshape(*blocks, len(rotation.inv_freq)).swapaxes(2, 3)
        image = image.reshape(-1, len(rotation.inv_freq))
        angles.append(image if len(rotation.names) == 3 else np.tile(image, (frames, 1)))
    return RotaryTable.from_angles(np.concatenate(angles), like=like)
