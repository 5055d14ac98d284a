"""Rotary tables of diffusion transformers and vision encoders, by the names of the models.

A builder knows the positions of a model's tokens on each axis, the number of elements of a head
that each axis rotates, and the base of the frequencies. Pass the table that it returns to
`apply_rotary_qk(q, k, table, interleaved=True)`, or with ``interleaved=False`` where the docstring
of the builder says so, as for vision encoders. The docstring also says which rows the table has.
Models that add positions to their tokens, such as Stable Diffusion 3, have no table.

Arguments of every builder:

- ``like``: an array, such as q. The table is made in its library and on its device.
- ``dims`` and ``base``: how many elements of a head each axis rotates, and the base of its
  frequencies. The defaults are those of diffusers or transformers. Where their module takes a
  ``head_dim``, the builder does too, and dims follow from it.
- ``compute_dtype``: "float64" computes cos and sin in float64 and rounds them to float32 once.
  "float32" computes in float32, by the operations of diffusers or transformers and in their order.
  Each docstring says in which dtype these libraries compute. Where it is float64, the default gives
  their numbers. Where it is float32, their angles have a relative error of up to some 2 ** -21: cos
  and sin are off by 1e-5 for Qwen-Image at 1328 x 1328, and by 4e-3 for LTX-Video. With "float32"
  and a PyTorch tensor as `like`, the table has their bits. `vision_encoder` always computes in
  float64.

A grid is counted in tokens: the frames, height and width of the latent divided by the patch size.

Every builder raises TypeError or ValueError if an argument is not what its docstring says.
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

    `ids` is an array of shape (tokens, 3), or (batch, tokens, 3) for a table by batch. In diffusers
    it is ``torch.cat((txt_ids, img_ids))``. diffusers computes in float64, and in float32 only on
    Apple's GPUs.

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

    `ids` has the shape (tokens, 4) or (batch, tokens, 4): time, height, width and the index in the
    text. diffusers computes in float64, and in float32 only on Apple's GPUs.

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

    This is the order of the model's joint attention, so one call rotates q and k of both. Where
    text and images are separate arrays, as in diffusers' attention processor, ``positions=0``
    rotates the text and ``positions=text_length`` the images.

    `grids` is one (frames, height, width), or several for the images of an edit, which follow each
    other by one frame. With `scale_rope`, heights and widths are centred at 0, and the text begins
    at half of the largest. Without it they begin at 0, and the text begins at the largest.

    Qwen-Image-Layered takes the same arguments but has another table: `qwen_image_layered`.
    diffusers computes in float32, on the CPU, up to 4096 positions.

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

    `grids` are rows of (frames, height, width): first the layers, which follow each other by one
    frame, and last the image that they are taken from, which has one frame, at -1. The text begins
    at half of the largest height or width, or without `scale_rope` at the largest, but at least at
    the number of layers. All else is as for `qwen_image`. In diffusers this model is Qwen-Image
    with ``use_layer3d_rope=True`` in its config.

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

    Height and width rotate 2 * (head_dim // 6) elements each, and the frame rotates the others.
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

    The text follows the video in the model's joint attention and is not rotated. `text_length`
    appends that many rows of angle 0, so that one call takes q and k of both. diffusers computes in
    float32.

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

    CogVideoX 1.0 spreads height and width over the central part of `base_size`, the (height, width)
    of its training, that has their aspect ratio. CogVideoX 1.5 counts from 0: pass
    ``base_size=None``. The frame rotates a quarter of the head, and height and width three eighths
    each.

    The text precedes the video in the model's joint attention and is not rotated. `text_length`
    prepends that many rows of angle 0. diffusers computes in float32.

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

    Its shape is (1, tokens, num_heads, head_dim / 2), so split q and k into heads first.

    `grid` is (frames, height, width). Its points are `scale` apart, in seconds and pixels; the
    default is for the model's VAE and 25 frames a second. Or `grid` is a float array of shape
    (batch, tokens, 3), of seconds and pixels, for a table by batch: diffusers' video_coords with
    the last two axes exchanged. Times, heights and widths are divided by `base_size`.

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

    This is the order of the model's unified sequence, in which both are padded to a multiple of
    `multiple` tokens. The padding of the image has the position (0, 0, 0); the padding of the text
    has the positions after it. A refiner sees only one of the two: call it with ``positions=0`` for
    the image, and for the text with the number of the image's tokens, padding included.

    `grid` is (frames, height, width). diffusers computes frequencies and angles in float64, rounds
    the angles to float32, and computes their cos and sin on the CPU.

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

    `grid` is (height, width), and `text_length` the number of tokens of the text without padding.
    For the context refiner, use the table without positions; for the noise refiner, with
    ``positions=text_length``.

    Where the texts of a batch differ in length, `text_length` is a sequence of lengths. The table
    then has the shape (batch, tokens, sum(dims) / 2), with rows of angle 0 after shorter sequences,
    and ``with_text=False`` gives only the rows of the image, for the noise refiner.

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

    `grids` is one (frames, height, width) in patches, or several, such as image_grid_thw; the rows
    of the grids follow one another. Patches are in the order of the encoder: frame by frame, in
    blocks of `merge_size` by `merge_size`. Height rotates the first half of the pairs and width the
    second. transformers computes in float32, and the frequencies on the CPU.

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

    `grids` is one (height, width) in patches, or several; the rows of the grids follow one another.
    Height rotates the first half of the pairs, by frequencies 0, 2, 4, ... of the whole head, and
    width rotates the second half, by frequencies 1, 3, 5, ... transformers computes in float32, and
    the frequencies on the CPU, and rounds the table to the dtype of the patches.

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
