"""Rotary tables of diffusion transformers and vision encoders, by the names of the models.

A model here is the positions of its tokens on some axes, how many elements of a head each axis
rotates, and a base. What a builder returns goes to
`apply_rotary_qk(q, k, table, interleaved=True)`, or with ``interleaved=False`` where the docstring
of its builder says so, as for vision encoders; the docstring also says what the rows of the table
are. Models whose positions are added to their tokens, such as Stable Diffusion 3, have no table.

Arguments of every builder:

- ``like``: the array in whose library and on whose device the table is made, such as q.
- ``dims`` and ``base``: elements of a head that each axis rotates, and the base of its frequencies.
  The defaults are those of the modules of diffusers or transformers. A model whose module takes a
  ``head_dim`` has its dims follow from it.
- ``compute_dtype``: "float64" computes cos and sin in float64 and rounds them to float32 once.
  "float32" computes in float32, by the operations of diffusers or transformers and in their order.
  Each docstring says in which dtype they compute. Where it is float64, the default has the numbers
  of theirs. Where it is float32, their angles are off by up to some 2 ** -21 of their size: cos
  and sin by 1e-5 for Qwen-Image at 1328 x 1328, by 4e-3 for LTX-Video. With "float32" and a PyTorch
  tensor as `like` the table has the bits of theirs. `vision_encoder` computes in float64 alone.

A grid is counted in tokens: the latent's frames, height and width divided by the patch size.

Every builder raises TypeError or ValueError where an argument is not what it says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import is_kind_of_array
from .checks import count, positive
from .choices import ComputeDtype
from .frequencies import axial
from .image_tables import cogview4, ernie_image, hunyuan_image, qwen_image21, vision_encoder
from .model_tables import (
    computed_in_order,
    crop_of,
    float32_table,
    frequencies_on_host,
    grid_of,
    head_size,
    is_exact,
    numbers_of,
    positions_of_ids,
    qwen_positions,
    sizes_of,
    spread_of,
    table_of,
    three_of,
)
from .tables import RotaryTable
from .video_tables import cosmos, kandinsky5, ltx2_audio, ltx2_video, ltx2_video_cross, mochi

__all__ = [
    "cogvideox",
    "cogview4",
    "cosmos",
    "ernie_image",
    "flux",
    "flux2",
    "hunyuan_image",
    "hunyuan_video",
    "kandinsky5",
    "ltx2_audio",
    "ltx2_video",
    "ltx2_video_cross",
    "ltx_video",
    "lumina2",
    "mochi",
    "pixtral_vision",
    "qwen2_vl_vision",
    "qwen_image",
    "qwen_image21",
    "qwen_image_layered",
    "vision_encoder",
    "wan",
    "z_image",
]


def flux(
    ids: Any,
    *,
    like: Any,
    dims: Sequence[int] = (16, 56, 56),
    base: float = 10000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of Flux from the ids of its tokens: text first, then image.

    `ids` is an array of shape (tokens, 3), or (batch, tokens, 3) for a table of each batch. In
    diffusers it is ``torch.cat((txt_ids, img_ids))``. It computes in float64, and in float32 on
    Apple's GPUs alone.

    >>> import numpy as np
    >>> image = np.stack(np.meshgrid(0, range(4), range(6), indexing="ij"), -1).reshape(-1, 3)
    >>> flux(np.concatenate([np.zeros((8, 3)), image]), like=np.zeros(1))
    RotaryTable(shape=(32, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    return table_of(positions_of_ids(ids, dims), dims, base, like, compute_dtype)


def flux2(
    ids: Any,
    *,
    like: Any,
    dims: Sequence[int] = (32, 32, 32, 32),
    base: float = 2000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of Flux 2 from the ids of its tokens: text first, then image.

    `ids` has the shape (tokens, 4) or (batch, tokens, 4), of time, height, width and index in the
    text. diffusers computes in float64, and in float32 on Apple's GPUs alone.

    >>> import numpy as np
    >>> flux2(np.zeros((8, 4)), like=np.zeros(1))
    RotaryTable(shape=(8, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    return flux(ids, like=like, dims=dims, base=base, compute_dtype=compute_dtype)


def qwen_image(
    grids: Any,
    text_length: int,
    *,
    like: Any,
    scale_rope: bool = True,
    dims: Sequence[int] = (16, 56, 56),
    base: float = 10000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of Qwen-Image: the rows of the text, then those of the images.

    This is the order of its joint attention, so one call rotates q and k of both. Where they are
    apart, as in diffusers' attention processor, ``positions=0`` rotates the text's and
    ``positions=text_length`` the images'.

    `grids` is (frames, height, width), or several of them: the images of an edit, each one frame
    after the one before. With `scale_rope` height and width are centred at 0 and the text begins at
    half the largest of them, without it they begin at 0 and the text begins at the largest.

    Qwen-Image-Layered has the same arguments and another table: `qwen_image_layered`. diffusers
    computes in float32, in the memory of the CPU, up to 4096 positions.

    >>> import numpy as np
    >>> qwen_image((1, 4, 6), 8, like=np.zeros(1))
    RotaryTable(shape=(32, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    sizes = sizes_of("grids", grids, 3)
    placed = list(zip(range(len(sizes)), sizes, strict=True))
    positions = qwen_positions(placed, count("text_length", text_length), scale_rope)
    return table_of(positions, dims, base, like, compute_dtype, on_host=True)


def qwen_image_layered(
    grids: Any,
    text_length: int,
    *,
    like: Any,
    scale_rope: bool = True,
    dims: Sequence[int] = (16, 56, 56),
    base: float = 10000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of Qwen-Image-Layered: rows of the text, the layers and the condition.

    `grids` are rows of (frames, height, width): those of the layers, each one frame after the one
    before, and last that of the image which they are taken from, of one frame, which lies at the
    frame -1. The text begins at half the largest height or width, without `scale_rope` at the
    largest, or at the number of layers where this is more. All else is as for `qwen_image`. In
    diffusers it is the Qwen-Image of a config with ``use_layer3d_rope=True``.

    >>> import numpy as np
    >>> qwen_image_layered([(1, 4, 6), (1, 4, 6), (1, 4, 6)], 8, like=np.zeros(1))
    RotaryTable(shape=(80, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    *layers, condition = sizes_of("grids", grids, 3)
    if not layers or condition[0] != 1:
        raise ValueError(
            "grids must be those of one layer or more, then of the condition, of one frame, got "
            f"{len(layers) + 1} rows, the last of {condition[0]} frames"
        )
    placed = [*zip(range(len(layers)), layers, strict=True), (-1, condition)]
    length = count("text_length", text_length)
    positions = qwen_positions(placed, length, scale_rope, text_from=len(layers))
    return table_of(positions, dims, base, like, compute_dtype, on_host=True)


def wan(
    grid: Any,
    *,
    like: Any,
    head_dim: int = 128,
    base: float = 10000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of Wan from its grid (frames, height, width).

    Height and width rotate 2 * (head_dim // 6) elements each and the frame those that are left.
    diffusers computes in float64, and in float32 where PyTorch finds Apple's GPUs.

    >>> import numpy as np
    >>> wan((2, 4, 6), like=np.zeros(1))
    RotaryTable(shape=(48, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    side = 2 * (head_size(head_dim, 2, at_least=6) // 6)
    dims = head_dim - 2 * side, side, side
    (size,) = sizes_of("grid", grid, 3, at_most=1)
    return table_of(grid_of(size), dims, base, like, compute_dtype)


def hunyuan_video(
    grid: Any,
    *,
    like: Any,
    text_length: int = 0,
    dims: Sequence[int] = (16, 56, 56),
    base: float = 256.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of HunyuanVideo from its grid (frames, height, width).

    The text follows the video in its joint attention and is not rotated: `text_length` appends as
    many rows of angle 0, so that one call rotates q and k of both. diffusers computes in float32.

    >>> import numpy as np
    >>> hunyuan_video((2, 4, 6), like=np.zeros(1), text_length=8)
    RotaryTable(shape=(56, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    (size,) = sizes_of("grid", grid, 3, at_most=1)
    still = np.zeros((count("text_length", text_length), 3))
    return table_of(np.concatenate([grid_of(size), still]), dims, base, like, compute_dtype)


def cogvideox(
    grid: Any,
    *,
    like: Any,
    text_length: int = 0,
    base_size: tuple[int, int] | None = (30, 45),
    head_dim: int = 64,
    base: float = 10000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of CogVideoX from its grid (frames, height, width).

    CogVideoX 1.0 spreads height and width over that part of the `base_size` it was trained at,
    (height, width), which has their aspect ratio, centred. CogVideoX 1.5 counts from 0: pass
    ``base_size=None``. The frame rotates a quarter of the head, height and width three eighths
    each.

    The text precedes the video in its joint attention and is not rotated: `text_length` prepends as
    many rows of angle 0. diffusers computes in float32.

    >>> import numpy as np
    >>> cogvideox((2, 4, 6), like=np.zeros(1), text_length=8)
    RotaryTable(shape=(56, 32), rotary_dim=64, dtype='float32', device='cpu')
    """
    head_dim = head_size(head_dim, 16)
    ((frames, height, width),) = sizes_of("grid", grid, 3, at_most=1)
    if base_size is None:
        ends = [(0.0, size - 1.0, size) for size in (frames, height, width)]
    else:
        ((base_height, base_width),) = sizes_of("base_size", base_size, 2, at_most=1)
        ends = [(0.0, frames - 1.0, frames)]
        for spread, size, whole in crop_of(height, width, base_height, base_width):
            first = round((whole - spread) / 2)
            ends.append((first, (first + spread) * (size - 1) / size, size))
    axes = spread_of(ends, like, is_exact(compute_dtype))
    video = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    still = np.zeros((count("text_length", text_length), 3))
    dims = head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3
    return table_of(np.concatenate([still, video]), dims, base, like, compute_dtype)


def ltx_video(
    grid: Any,
    *,
    like: Any,
    scale: Sequence[float] = (8 / 25, 32.0, 32.0),
    base_size: Sequence[int] = (20, 2048, 2048),
    num_heads: int = 32,
    head_dim: int = 64,
    base: float = 10000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of LTX-Video, in which every head has angles of its own.

    Its shape is (1, tokens, num_heads, head_dim / 2): q and k are to be split into heads.

    `grid` is (frames, height, width), of points that lie `scale` apart, in seconds and pixels: the
    default is that of 25 frames a second and of its VAE. Or `grid` is a float array of shape
    (batch, tokens, 3) of the seconds and pixels themselves, for a table of each batch: diffusers'
    video_coords with the last two axes exchanged. `base_size` is the time, height and width that
    these are divided by.

    diffusers computes in float32.

    >>> import numpy as np
    >>> ltx_video((2, 4, 6), like=np.zeros(1))
    RotaryTable(shape=(1, 48, 32, 32), axes='bsh', rotary_dim=64, dtype='float32', device='cpu')
    """
    num_heads = count("num_heads", num_heads, at_least=1)
    width = num_heads * head_size(head_dim, 2, at_least=6)
    (wholes,) = sizes_of("base_size", base_size, 3, at_most=1)
    if is_kind_of_array(type(grid)):  # type: ignore[arg-type]
        points, apart = numbers_of("grid", grid)[0], [1.0, 1.0, 1.0]
        if points.ndim != 3 or points.shape[-1] != 3:
            raise ValueError(f"grid must have the shape (batch, tokens, 3), got {points.shape}")
    else:
        points, apart = (
            grid_of(sizes_of("grid", grid, 3, at_most=1)[0])[None],
            three_of("scale", scale),
        )

    def angles(module: Any, points: Any, exponents: Any) -> Any:
        shares = [points[..., axis] * apart[axis] / wholes[axis] for axis in range(3)]
        signed = module.stack(shares, -1)[..., None, :] * 2 - 1
        angle = (base**exponents * math.pi / 2.0)[:, None] * signed
        angle = angle.reshape(*points.shape[:2], -1)
        still = module.zeros_like(angle[..., : width % 6 // 2])
        return module.concatenate([still, angle], -1).reshape(*points.shape[:2], num_heads, -1)

    def cos_and_sin(module: Any, points: Any) -> tuple[Any, Any]:
        exponents = module.linspace(0.0, 1.0, width // 6, dtype=module.float32)
        angle = angles(module, points, exponents)
        return module.cos(angle), module.sin(angle)

    base = positive("base", base)
    if is_exact(compute_dtype):
        angle = angles(np, points, np.linspace(0.0, 1.0, width // 6))
        return RotaryTable.from_angles(angle, like=like)
    return RotaryTable(*computed_in_order(cos_and_sin, [points.astype(np.float32)], like))


def z_image(
    grid: Any,
    text_length: int,
    *,
    like: Any,
    multiple: int = 32,
    dims: Sequence[int] = (32, 48, 48),
    base: float = 256.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of Z-Image: the rows of the image, then those of the text.

    This is the order of its unified sequence, in which both are padded to a `multiple` of tokens.
    Its refiners, which see one of them, take ``positions=0`` for the image and for the text the
    number of the image's tokens, padding included. The padding of an image has the position
    (0, 0, 0), that of a text counts on.

    `grid` is (frames, height, width). diffusers computes frequencies and angles in float64, rounds
    the angles to float32, and computes cos and sin of those in the memory of the CPU.

    >>> import numpy as np
    >>> z_image((1, 4, 6), 8, like=np.zeros(1))
    RotaryTable(shape=(64, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    multiple, (size,) = count("multiple", multiple, 1), sizes_of("grid", grid, 3, at_most=1)
    text_length = count("text_length", text_length)
    text = grid_of((text_length + -text_length % multiple, 1, 1), start=(1, 0, 0))
    image = grid_of(size, start=(len(text) + 1, 0, 0))
    padding = np.zeros((-len(image) % multiple, 3))
    positions = np.concatenate([image, padding, text])
    return table_of(positions, dims, base, like, compute_dtype, on_host=True, angle_dtype="float64")


def lumina2(
    grid: Any,
    text_length: Any,
    *,
    like: Any,
    with_text: bool = True,
    dims: Sequence[int] = (32, 32, 32),
    base: float = 10000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of Lumina 2: the rows of the text, then those of the image.

    `grid` is (height, width), `text_length` the number of the text's tokens that count. The context
    refiner takes the table as it is, the noise refiner ``positions=text_length``.

    Where the texts of a batch differ in length, `text_length` is a sequence of them, and the table
    has the shape (batch, tokens, sum(dims) / 2), with rows of angle 0 behind the shorter ones. Then
    ``with_text=False`` gives the rows of the image alone, for the noise refiner.

    diffusers computes in float64, and in float32 where PyTorch finds Apple's GPUs.

    >>> import numpy as np
    >>> lumina2((4, 6), 8, like=np.zeros(1))
    RotaryTable(shape=(32, 48), rotary_dim=96, dtype='float32', device='cpu')
    >>> lumina2((4, 6), [8, 5], like=np.zeros(1))
    RotaryTable(shape=(2, 32, 48), axes='bs', rotary_dim=96, dtype='float32', device='cpu')
    """
    several = isinstance(text_length, list | tuple)
    if several and not text_length:
        raise ValueError(f"text_length must be an int or a sequence of them, got {text_length}")
    lengths = [count("text_length", each) for each in (text_length if several else [text_length])]
    (size,) = sizes_of("grid", grid, 2, at_most=1)
    rows = max(lengths) + math.prod(size)
    samples = []
    for length in lengths:
        image = grid_of((1, *size), start=(length, 0, 0))
        text = grid_of((length, 1, 1))
        padding = np.zeros((rows - len(text) - len(image), 3))
        samples.append(np.concatenate([text, image, padding]) if with_text else image)
    positions = np.stack(samples) if several else samples[0]
    return table_of(positions, dims, base, like, compute_dtype, on_host=True)


def qwen2_vl_vision(
    grids: Any,
    *,
    like: Any,
    merge_size: int = 2,
    head_dim: int = 80,
    base: float = 10000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of Qwen2-VL's vision encoder, for ``interleaved=False``.

    `grids` is (frames, height, width) in patches or several of them, such as image_grid_thw: the
    rows of one grid follow those of another. Patches are in the order of the encoder: every frame
    anew, in blocks of `merge_size` by `merge_size`. Height rotates the first half of the pairs and
    width the second. transformers computes in float32, the frequencies in the memory of the CPU.

    >>> import numpy as np
    >>> qwen2_vl_vision([(1, 4, 6), (1, 2, 2)], like=np.zeros(1))
    RotaryTable(shape=(28, 40), rotary_dim=80, dtype='float32', device='cpu')
    """
    half, merge_size = head_size(head_dim, 4) // 2, count("merge_size", merge_size, at_least=1)
    images = []
    for frames, height, width in sizes_of("grids", grids, 3):
        if height % merge_size or width % merge_size:
            raise ValueError(
                f"grids must have heights and widths that merge_size={merge_size} divides, got "
                f"{height} by {width}"
            )
        blocks = height // merge_size, merge_size, width // merge_size, merge_size, 2
        image = grid_of((height, width)).reshape(blocks).swapaxes(1, 2).reshape(-1, 2)
        images.append(np.tile(image, (frames, 1)))
    positions = np.concatenate(images)
    if is_exact(compute_dtype):
        return RotaryTable.from_angles(axial(positions, (half, half), base), like=like)
    frequencies = frequencies_on_host(half, base, like)
    return float32_table(positions, (frequencies, frequencies), like)


def pixtral_vision(
    grids: Any,
    *,
    like: Any,
    head_dim: int = 64,
    base: float = 10000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of Pixtral's vision encoder, for ``interleaved=False``.

    `grids` is (height, width) in patches or several of them: the rows of one grid follow those of
    another. Of the frequencies of the whole head height takes every other, and width those
    between: the first half of the pairs and the second. transformers computes in float32, the
    frequencies in the memory of the CPU, and rounds the table to the dtype of the patches.

    >>> import numpy as np
    >>> pixtral_vision([(4, 6), (2, 2)], like=np.zeros(1))
    RotaryTable(shape=(28, 32), rotary_dim=64, dtype='float32', device='cpu')
    """
    half, base = head_size(head_dim, 4) // 2, positive("base", base)
    positions = np.concatenate([grid_of(size) for size in sizes_of("grids", grids, 2)])
    if is_exact(compute_dtype):
        slower = np.array([1.0, base ** (-2 / head_dim)])
        return RotaryTable.from_angles(axial(positions * slower, (half, half), base), like=like)
    frequencies = frequencies_on_host(head_dim, base, like)
    return float32_table(positions, (frequencies[::2], frequencies[1::2]), like)
