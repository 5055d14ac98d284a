"""Rotary tables of diffusion transformers and vision encoders, by the names of the models.

A model here is the positions of its tokens on some axes, how many elements of a head each axis
turns, and a base. What a builder returns goes to `apply_rotary_qk(q, k, table, interleaved=True)`,
or with ``interleaved=False`` for the two vision encoders; the docstring of each builder says what
the rows of its table are. Models whose positions are added to their tokens, such as Stable
Diffusion 3, have no table.

Arguments of every builder:

- ``like``: the array in whose library and on whose device the table is made, such as q.
- ``dims`` and ``base``: elements of a head that each axis turns, and the base of its frequencies.
  The defaults are those of the modules of diffusers or transformers. A model whose module takes a
  ``head_dim`` has its dims follow from it.
- ``compute_dtype``: "float64" computes cos and sin in float64 and rounds them to float32 once.
  "float32" computes in float32, by the operations of diffusers or transformers and in their order.
  Each docstring says in which dtype they compute. Where it is float64, the default has the numbers
  of theirs. Where it is float32, their angles are off by up to some 2 ** -21 of their size: cos
  and sin by 1e-5 for Qwen-Image at 1328 x 1328, by 4e-3 for LTX-Video. With "float32" and a PyTorch
  tensor as `like` the table has the bits of theirs.

A grid is counted in tokens: the latent's frames, height and width divided by the patch size.

Every builder raises TypeError or ValueError where an argument is not what it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import tensor
from .checks import count, described, index, positive
from .frequencies import axial
from .tables import RotaryTable

Positions = NDArray[np.float64]  # (..., tokens, axes)


def flux(
    ids: Any,
    *,
    like: Any,
    dims: Sequence[int] = (16, 56, 56),
    base: float = 10000.0,
    compute_dtype: str = "float64",
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
    return _table(_ids(ids, dims), dims, base, like, compute_dtype)


def flux2(
    ids: Any,
    *,
    like: Any,
    dims: Sequence[int] = (32, 32, 32, 32),
    base: float = 2000.0,
    compute_dtype: str = "float64",
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
    compute_dtype: str = "float64",
) -> RotaryTable:
    """Return the table of Qwen-Image: the rows of the text, then those of the images.

    This is the order of its joint attention, so one call turns q and k of both. Where they are
    apart, as in diffusers' attention processor, ``positions=0`` turns the text's and
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
    sizes = _sizes("grids", grids, 3)
    placed = list(zip(range(len(sizes)), sizes, strict=True))
    positions = _qwen_positions(placed, count("text_length", text_length), scale_rope)
    return _table(positions, dims, base, like, compute_dtype, on_host=True)


def qwen_image_layered(
    grids: Any,
    text_length: int,
    *,
    like: Any,
    scale_rope: bool = True,
    dims: Sequence[int] = (16, 56, 56),
    base: float = 10000.0,
    compute_dtype: str = "float64",
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
    *layers, condition = _sizes("grids", grids, 3)
    if not layers or condition[0] != 1:
        raise ValueError(
            "grids must be those of one layer or more, then of the condition, of one frame, got "
            f"{len(layers) + 1} rows, the last of {condition[0]} frames"
        )
    placed = [*zip(range(len(layers)), layers, strict=True), (-1, condition)]
    length = count("text_length", text_length)
    positions = _qwen_positions(placed, length, scale_rope, text_from=len(layers))
    return _table(positions, dims, base, like, compute_dtype, on_host=True)


def wan(
    grid: Any,
    *,
    like: Any,
    head_dim: int = 128,
    base: float = 10000.0,
    compute_dtype: str = "float64",
) -> RotaryTable:
    """Return the table of Wan from its grid (frames, height, width).

    Height and width turn 2 * (head_dim // 6) elements each and the frame those that are left.
    diffusers computes in float64, and in float32 where PyTorch finds Apple's GPUs.

    >>> import numpy as np
    >>> wan((2, 4, 6), like=np.zeros(1))
    RotaryTable(shape=(48, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    side = 2 * (_head_dim(head_dim, 2, at_least=6) // 6)
    dims = head_dim - 2 * side, side, side
    (size,) = _sizes("grid", grid, 3, at_most=1)
    return _table(_grid(size), dims, base, like, compute_dtype)


def hunyuan_video(
    grid: Any,
    *,
    like: Any,
    text_length: int = 0,
    dims: Sequence[int] = (16, 56, 56),
    base: float = 256.0,
    compute_dtype: str = "float64",
) -> RotaryTable:
    """Return the table of HunyuanVideo from its grid (frames, height, width).

    The text follows the video in its joint attention and does not turn: `text_length` appends as
    many rows of angle 0, so that one call turns q and k of both. diffusers computes in float32.

    >>> import numpy as np
    >>> hunyuan_video((2, 4, 6), like=np.zeros(1), text_length=8)
    RotaryTable(shape=(56, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    (size,) = _sizes("grid", grid, 3, at_most=1)
    still = np.zeros((count("text_length", text_length), 3))
    return _table(np.concatenate([_grid(size), still]), dims, base, like, compute_dtype)


def cogvideox(
    grid: Any,
    *,
    like: Any,
    text_length: int = 0,
    base_size: tuple[int, int] | None = (30, 45),
    head_dim: int = 64,
    base: float = 10000.0,
    compute_dtype: str = "float64",
) -> RotaryTable:
    """Return the table of CogVideoX from its grid (frames, height, width).

    CogVideoX 1.0 spreads height and width over that part of the `base_size` it was trained at,
    (height, width), which has their aspect ratio, centred. CogVideoX 1.5 counts from 0: pass
    ``base_size=None``. The frame turns a quarter of the head, height and width three eighths each.

    The text precedes the video in its joint attention and does not turn: `text_length` prepends as
    many rows of angle 0. diffusers computes in float32.

    >>> import numpy as np
    >>> cogvideox((2, 4, 6), like=np.zeros(1), text_length=8)
    RotaryTable(shape=(56, 32), rotary_dim=64, dtype='float32', device='cpu')
    """
    head_dim = _head_dim(head_dim, 16)
    ((frames, height, width),) = _sizes("grid", grid, 3, at_most=1)
    if base_size is None:
        ends = [(0.0, size - 1.0, size) for size in (frames, height, width)]
    else:
        ((base_height, base_width),) = _sizes("base_size", base_size, 2, at_most=1)
        ends = [(0.0, frames - 1.0, frames)]
        for spread, size, whole in _crop(height, width, base_height, base_width):
            first = round((whole - spread) / 2)
            ends.append((first, (first + spread) * (size - 1) / size, size))
    axes = _spread(ends, like, _is_exact(compute_dtype))
    video = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    still = np.zeros((count("text_length", text_length), 3))
    dims = head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3
    return _table(np.concatenate([still, video]), dims, base, like, compute_dtype)


def ltx_video(
    grid: Any,
    *,
    like: Any,
    scale: Sequence[float] = (8 / 25, 32.0, 32.0),
    base_size: Sequence[int] = (20, 2048, 2048),
    num_heads: int = 32,
    head_dim: int = 64,
    base: float = 10000.0,
    compute_dtype: str = "float64",
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
    width = num_heads * _head_dim(head_dim, 2, at_least=6)
    (wholes,) = _sizes("base_size", base_size, 3, at_most=1)
    if tensor.is_kind_of_array(type(grid)):  # type: ignore[arg-type]
        points, apart = _numbers("grid", grid)[0], [1.0, 1.0, 1.0]
        if points.ndim != 3 or points.shape[-1] != 3:
            raise ValueError(f"grid must have the shape (batch, tokens, 3), got {points.shape}")
    else:
        points, apart = _grid(_sizes("grid", grid, 3, at_most=1)[0])[None], _three("scale", scale)

    def angles(module: Any, points: Any, exponents: Any) -> Any:
        shares = [points[..., axis] * apart[axis] / wholes[axis] for axis in range(3)]
        signed = module.stack(shares, -1)[..., None, :] * 2 - 1
        turned = (base**exponents * math.pi / 2.0)[:, None] * signed
        turned = turned.reshape(*points.shape[:2], -1)
        still = module.zeros_like(turned[..., : width % 6 // 2])
        return module.concatenate([still, turned], -1).reshape(*points.shape[:2], num_heads, -1)

    def cos_and_sin(module: Any, points: Any) -> tuple[Any, Any]:
        exponents = module.linspace(0.0, 1.0, width // 6, dtype=module.float32)
        turned = angles(module, points, exponents)
        return module.cos(turned), module.sin(turned)

    base = positive("base", base)
    if _is_exact(compute_dtype):
        turned = angles(np, points, np.linspace(0.0, 1.0, width // 6))
        return RotaryTable.from_angles(turned, like=like)
    return RotaryTable(*_computed(cos_and_sin, [points.astype(np.float32)], like))


def z_image(
    grid: Any,
    text_length: int,
    *,
    like: Any,
    multiple: int = 32,
    dims: Sequence[int] = (32, 48, 48),
    base: float = 256.0,
    compute_dtype: str = "float64",
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
    multiple, (size,) = count("multiple", multiple, 1), _sizes("grid", grid, 3, at_most=1)
    text_length = count("text_length", text_length)
    text = _grid((text_length + -text_length % multiple, 1, 1), start=(1, 0, 0))
    image = _grid(size, start=(len(text) + 1, 0, 0))
    padding = np.zeros((-len(image) % multiple, 3))
    positions = np.concatenate([image, padding, text])
    return _table(positions, dims, base, like, compute_dtype, on_host=True, angle_dtype="float64")


def lumina2(
    grid: Any,
    text_length: Any,
    *,
    like: Any,
    with_text: bool = True,
    dims: Sequence[int] = (32, 32, 32),
    base: float = 10000.0,
    compute_dtype: str = "float64",
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
    (size,) = _sizes("grid", grid, 2, at_most=1)
    rows = max(lengths) + math.prod(size)
    samples = []
    for length in lengths:
        image = _grid((1, *size), start=(length, 0, 0))
        text = _grid((length, 1, 1))
        padding = np.zeros((rows - len(text) - len(image), 3))
        samples.append(np.concatenate([text, image, padding]) if with_text else image)
    positions = np.stack(samples) if several else samples[0]
    return _table(positions, dims, base, like, compute_dtype, on_host=True)


def qwen2_vl_vision(
    grids: Any,
    *,
    like: Any,
    merge_size: int = 2,
    head_dim: int = 80,
    base: float = 10000.0,
    compute_dtype: str = "float64",
) -> RotaryTable:
    """Return the table of Qwen2-VL's vision encoder, for ``interleaved=False``.

    `grids` is (frames, height, width) in patches or several of them, such as image_grid_thw: the
    rows of one grid follow those of another. Patches are in the order of the encoder: every frame
    anew, in blocks of `merge_size` by `merge_size`. Height turns the first half of the pairs and
    width the second. transformers computes in float32, the frequencies in the memory of the CPU.

    >>> import numpy as np
    >>> qwen2_vl_vision([(1, 4, 6), (1, 2, 2)], like=np.zeros(1))
    RotaryTable(shape=(28, 40), rotary_dim=80, dtype='float32', device='cpu')
    """
    half, merge_size = _head_dim(head_dim, 4) // 2, count("merge_size", merge_size, at_least=1)
    images = []
    for frames, height, width in _sizes("grids", grids, 3):
        if height % merge_size or width % merge_size:
            raise ValueError(
                f"grids must have heights and widths that merge_size={merge_size} divides, got "
                f"{height} by {width}"
            )
        blocks = height // merge_size, merge_size, width // merge_size, merge_size, 2
        image = _grid((height, width)).reshape(blocks).swapaxes(1, 2).reshape(-1, 2)
        images.append(np.tile(image, (frames, 1)))
    positions = np.concatenate(images)
    if _is_exact(compute_dtype):
        return RotaryTable.from_angles(axial(positions, (half, half), base), like=like)
    frequencies = _frequencies_on_host(half, base, like)
    return _float32(positions, (frequencies, frequencies), like)


def pixtral_vision(
    grids: Any,
    *,
    like: Any,
    head_dim: int = 64,
    base: float = 10000.0,
    compute_dtype: str = "float64",
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
    half, base = _head_dim(head_dim, 4) // 2, positive("base", base)
    positions = np.concatenate([_grid(size) for size in _sizes("grids", grids, 2)])
    if _is_exact(compute_dtype):
        slower = np.array([1.0, base ** (-2 / head_dim)])
        return RotaryTable.from_angles(axial(positions * slower, (half, half), base), like=like)
    frequencies = _frequencies_on_host(head_dim, base, like)
    return _float32(positions, (frequencies[::2], frequencies[1::2]), like)


def _table(
    positions: Positions,
    dims: Sequence[int],
    base: float,
    like: Any,
    compute_dtype: str,
    *,
    on_host: bool = False,
    angle_dtype: str = "float32",
) -> RotaryTable:
    """Return the table of positions.

    How diffusers computes it in float32: `on_host` in the memory of the CPU and by polar
    coordinates, with angles first of `angle_dtype`.
    """
    base, axes = positive("base", base), positions.shape[-1]
    if len(_dims(dims)) != axes:
        raise ValueError(f"dims must be {axes} even ints, one for each axis, got {dims}")
    if _is_exact(compute_dtype):
        return RotaryTable.from_angles(axial(positions, dims, base), like=like)
    axial(positions[..., :0, :], dims, base)  # refuses dims that are not positive and even

    def cos_and_sin(module: Any, positions: Any, *steps: Any) -> tuple[Any, Any]:
        sizes = zip(steps, dims, strict=True)
        frequencies = [_inverse(base, step, dim) for step, dim in sizes]
        return _cos_and_sin(module, positions, frequencies, by_polar=on_host)

    steps = [np.arange(0, dim, 2).astype(angle_dtype) for dim in dims]
    arrays = [positions.astype(angle_dtype), *steps]
    return RotaryTable(*_computed(cos_and_sin, arrays, like, on_host))


def _qwen_positions(
    grids: Sequence[tuple[int, tuple[int, ...]]],
    text_length: int,
    scale_rope: bool,
    text_from: int = 0,
) -> Positions:
    """Return the positions of a text, then of images, given as (first frame, size)."""
    text_start, share, images = text_from, 2 if scale_rope else 1, []
    for frame, (frames, height, width) in grids:
        text_start = max(text_start, height // share, width // share)
        top, left = ((height + 1) // 2, (width + 1) // 2) if scale_rope else (0, 0)
        images.append(_grid((frames, height, width), start=(frame, -top, -left)))
    text = np.repeat(text_start + np.arange(text_length, dtype=np.float64), 3).reshape(-1, 3)
    return np.concatenate([text, *images])


def _inverse(base: float, steps: Any, dim: int) -> Any:
    return 1.0 / base ** (steps / dim)


def _frequencies_on_host(dim: int, base: float, like: Any) -> NDArray[np.float32]:
    steps = np.arange(0, dim, 2, dtype=np.float32)
    base = positive("base", base)
    (frequencies,) = _computed(
        lambda _, steps: (_inverse(base, steps, dim),), [steps], like, on_host=True
    )
    return _downloaded(frequencies, like)


def _float32(positions: Positions, frequencies: Sequence[Any], like: Any) -> RotaryTable:
    arrays = [positions.astype(np.float32), *frequencies]
    return RotaryTable(
        *_computed(lambda module, at, *of: _cos_and_sin(module, at, of), arrays, like)
    )


def _cos_and_sin(
    module: Any, positions: Any, frequencies: Sequence[Any], by_polar: bool = False
) -> tuple[Any, Any]:
    """Return float32 cos and sin of the angles of every axis, one axis after another."""
    axes = enumerate(frequencies)
    angles = module.concatenate([positions[..., axis, None] * pairs for axis, pairs in axes], -1)
    angles = module.asarray(angles, dtype=module.float32)
    if by_polar and _is_torch(module):  # whose cos and sin give other bits
        turns = module.polar(module.ones_like(angles), angles)
        return turns.real, turns.imag
    return module.cos(angles), module.sin(angles)


def _computed(
    function: Callable[..., tuple[Any, ...]],
    arrays: Sequence[NDArray[Any]],
    like: Any,
    on_host: bool = False,
) -> tuple[Any, ...]:
    """Return what a function(module, *arrays) makes where `like` lies.

    With `on_host`, PyTorch computes in the memory of the CPU, wherever `like` lies.
    """
    if not on_host:
        return tensor.computed(function, arrays, like)

    def there(module: Any) -> tuple[Any, ...]:
        with module.device("cpu") if _is_torch(module) else nullcontext():
            return function(module, *map(module.asarray, arrays))

    results = tensor.computed(there, (), like)
    return tuple(tensor.placed(_downloaded(result, like), like) for result in results)


def _downloaded(array: Any, like: Any) -> NDArray[np.float32]:
    return np.array(tensor.library_of("like", like).download(array), np.float32)


def _is_torch(module: Any) -> bool:
    return bool(module.__name__ == "torch")


def _spread(ends: Sequence[tuple[float, float, int]], like: Any, exact: bool) -> list[Any]:
    """Return evenly spaced numbers from each (first, last, size)."""
    if exact:
        return [np.linspace(*axis) for axis in ends]
    axes = _computed(
        lambda module: tuple(module.linspace(*axis, dtype=module.float32) for axis in ends),
        [],
        like,
    )
    return [_downloaded(axis, like) for axis in axes]


def _crop(
    height: int, width: int, base_height: int, base_width: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return (size of the crop, tokens, size of the base) of the largest crop of this aspect."""
    if height / width > base_height / base_width:
        crop = base_height, round(base_height / height * width)
    else:
        crop = round(base_width / width * height), base_width
    return (crop[0], height, base_height), (crop[1], width, base_width)


def _grid(size: Sequence[int], start: Sequence[int] | int = 0) -> Positions:
    """Return the points of a grid, (tokens, axes), the last axis fastest."""
    return np.indices(size, np.float64).reshape(len(size), -1).T + start


def _ids(ids: Any, dims: Sequence[int]) -> Positions:
    positions, axes = _numbers("ids", ids)[0], len(_dims(dims))
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


def _sizes(name: str, values: Any, axes: int, at_most: int | None = None) -> list[tuple[int, ...]]:
    """Return one grid of `axes` ints, or several, as a list."""
    sizes, are_ints = _numbers(name, values)
    rows = sizes[None] if sizes.ndim == 1 else sizes
    wanted = f"{axes} ints of 1 or more" + ("" if at_most else ", or rows of these")
    if sizes.size and not are_ints:
        raise TypeError(f"{name} must be {wanted}, got {values!r}")
    if rows.ndim != 2 or rows.shape[1] != axes or not rows.size or (rows < 1).any():
        raise ValueError(f"{name} must be {wanted}, got {values!r}")
    if at_most and len(rows) > at_most:
        raise ValueError(f"{name} must be {wanted}, got {len(rows)} rows")
    return [tuple(map(int, row)) for row in rows]


def _three(name: str, values: Any) -> list[float]:
    numbers = _numbers(name, values)[0]
    if numbers.shape != (3,):
        raise ValueError(f"{name} must be 3 numbers, got shape {numbers.shape}")
    return [float(number) for number in numbers]


def _numbers(name: str, values: Any) -> tuple[Positions, bool]:
    """Return an array of any library, or nested sequences, as float64, and whether of ints."""
    if tensor.is_kind_of_array(type(values)):  # type: ignore[arg-type]
        dtype = tensor.describe(name, values).spec.dtype
        array = np.asarray(tensor.library_of(name, values).download(values))
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


def _head_dim(value: Any, multiple: int, at_least: int = 1) -> int:
    number = index("head_dim", value)
    if number < at_least or number % multiple:
        wanted = f"a multiple of {multiple}, {max(at_least, multiple)} or more"
        raise ValueError(f"head_dim must be {wanted}, got {number}")
    return number


def _is_exact(compute_dtype: Any) -> bool:
    if compute_dtype not in ("float64", "float32"):
        raise ValueError(
            f'compute_dtype must be "float64" or "float32", got {described(compute_dtype)}'
        )
    return bool(compute_dtype == "float64")
