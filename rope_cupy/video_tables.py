"""Tables of more video models, which `rope_cupy.diffusion` offers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .arrays import check_gradient, is_kind_of_array, library_of
from .checks import count, positive
from .choices import ComputeDtype
from .frequencies import axial
from .model_tables import (
    Positions,
    check_dims,
    computed_in_order,
    grid_of,
    head_size,
    is_exact,
    numbers_of,
    sizes_of,
    three_of,
)
from .tables import RotaryTable


def cosmos(
    grid: Any,
    *,
    like: Any,
    fps: float | None = None,
    base_fps: float = 24,
    scale: Sequence[float] = (2.0, 1.0, 1.0),
    head_dim: int = 128,
    base: float = 10000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of Cosmos from its grid (frames, height, width), for ``interleaved=False``.

    `scale` says how many times as long as in training each axis is, as diffusers' rope_scale does.
    The base of an axis of dim elements is `base` * scale ** (dim / (dim - 2)) (NTK-aware scaling).
    Frame t has the position t, as in an image, or with `fps`, the frames a second of a video,
    t * base_fps / fps. Height and width rotate 2 * (head_dim // 6) elements each, and the frame
    rotates the others. diffusers computes in float32.

    Source: bloc97, "NTK-Aware Scaled RoPE" (2023), for the base.

    >>> import numpy as np
    >>> cosmos((2, 4, 6), like=np.zeros(1), fps=30)
    RotaryTable(shape=(48, 64), rotary_dim=128, dtype='float32', device='cpu')
    """
    side = 2 * (head_size(head_dim, 2, at_least=12) // 6)
    dims = head_dim - 2 * side, side, side
    (size,) = sizes_of("grid", grid, 3, at_most=1)
    base, base_fps = positive("base", base), positive("base_fps", base_fps)
    every = None if fps is None else positive("fps", fps)
    scales = zip(_three_positive("scale", scale), dims, strict=True)
    bases = tuple(base * each ** (dim / (dim - 2)) for each, dim in scales)
    positions = grid_of(size)
    if is_exact(compute_dtype):
        if every:
            positions[:, 0] *= base_fps / every
        return RotaryTable.from_angles(axial(positions, dims, bases), like=like)

    def cos_and_sin(module: Any, positions: Any, *steps: Any) -> tuple[Any, Any]:
        frame, height, width = (positions[:, axis] for axis in range(3))
        frame = frame / every * base_fps if every else frame
        axes = zip((frame, height, width), steps, dims, bases, strict=True)
        pairs = [at[:, None] * (1.0 / base ** (step / dim)) for at, step, dim, base in axes]
        angles = module.concatenate(pairs, -1)
        return module.cos(angles), module.sin(angles)

    steps = [np.arange(0, dim, 2, dtype=np.float32) for dim in dims]
    arrays = [positions.astype(np.float32), *steps]
    return RotaryTable(*computed_in_order(cos_and_sin, arrays, like))


def kandinsky5(
    grid: Any,
    *,
    like: Any,
    scale: Sequence[float] = (1.0, 1.0, 1.0),
    block_size: int | None = None,
    dims: Sequence[int] = (16, 24, 24),
    base: float = 10000.0,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of Kandinsky 5 from its grid (frames, height, width).

    The angles of each axis are divided by its `scale`. diffusers takes (1, 2, 2) for videos with a
    height and a width from 480 to 854 pixels, (1, 3.16, 3.16) for other videos, and (1, 1, 1) for
    images. The sparse attention of long and large videos has the tokens of a frame in blocks of 8
    by 8: pass ``block_size=8``.

    The text is rotated separately, by the table of a language model:
    ``RotaryTable.from_inverse_frequencies(inverse_frequencies(64), text_length, like=q)``, for
    ``interleaved=True``. diffusers computes in float32, and the angles before their division on the
    CPU.

    >>> import numpy as np
    >>> kandinsky5((2, 4, 6), like=np.zeros(1), scale=(1, 2, 2))
    RotaryTable(shape=(48, 32), rotary_dim=64, dtype='float32', device='cpu')
    """
    (size,) = sizes_of("grid", grid, 3, at_most=1)
    check_dims(dims, 3)
    base, scales, positions = positive("base", base), _three_positive("scale", scale), grid_of(size)
    if block_size is not None:
        block, (frames, height, width) = count("block_size", block_size, at_least=1), size
        if height % block or width % block:
            raise ValueError(
                f"grid must have a height and a width that block_size={block} divides, got "
                f"{height} by {width}"
            )
        blocks = frames, height // block, block, width // block, block, 3
        positions = positions.reshape(blocks).swapaxes(2, 3).reshape(-1, 3)
    exact = axial(positions / scales, dims, base)
    if is_exact(compute_dtype):
        return RotaryTable.from_angles(exact, like=like)

    def whole_angles(module: Any, positions: Any, *steps: Any) -> tuple[Any, ...]:
        found = []
        for axis, (step, dim) in enumerate(zip(steps, dims, strict=True)):
            frequencies = module.exp(-math.log(base) * step / (dim // 2))
            found.append(positions[:, axis, None] * frequencies)
        return tuple(found)

    def cos_and_sin(module: Any, *angles: Any) -> tuple[Any, Any]:
        shares = [angle / each for angle, each in zip(angles, scales, strict=True)]
        angle = module.concatenate(shares, -1)
        return module.cos(angle), module.sin(angle)

    steps = [np.arange(dim // 2, dtype=np.float32) for dim in dims]
    arrays = [positions.astype(np.float32), *steps]
    whole = computed_in_order(whole_angles, arrays, like, on_host=True)
    library = library_of("like", like)
    on_host = [np.array(library.download(angles), np.float32) for angles in whole]
    return RotaryTable(*computed_in_order(cos_and_sin, on_host, like))


def mochi(
    grid: Any,
    frequencies: Any,
    *,
    like: Any,
    base_size: tuple[int, int] = (192, 192),
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of Mochi, in which every head has its own trained frequencies.

    Its shape is (1, tokens, heads, head_dim / 2). `grid` is (frames, height, width). `frequencies`
    is an array of any library of shape (3, heads, head_dim / 2): the model's pos_frequencies. The
    angle of a pair is the sum over the axes of position times frequency. Height and width are
    centred at 0 and scaled to the area of `base_size`, (height, width). Gradients do not reach the
    frequencies. The text is not rotated. diffusers computes in float32.

    >>> import numpy as np
    >>> mochi((2, 4, 6), np.ones((3, 24, 64)), like=np.zeros(1))
    RotaryTable(shape=(1, 48, 24, 64), axes='bsh', rotary_dim=128, dtype='float32', device='cpu')
    """
    ((frames, height, width),) = sizes_of("grid", grid, 3, at_most=1)
    ((base_height, base_width),) = sizes_of("base_size", base_size, 2, at_most=1)
    check_gradient("frequencies", frequencies)
    turns = numbers_of("frequencies", frequencies)[0]
    if turns.ndim != 3 or len(turns) != 3 or not turns.size:
        raise ValueError(
            f"frequencies must have the shape (3, heads, head_dim / 2), got {turns.shape}"
        )
    scale = (base_height * base_width / (height * width)) ** 0.5

    def angles(module: Any, frequencies: Any, dtype: Any) -> Any:
        axes = [module.arange(frames, dtype=dtype)]
        for size in (height, width):
            edges = module.linspace(-size * scale / 2, size * scale / 2, size + 1, dtype=dtype)
            axes.append((edges[:-1] + edges[1:]) / 2)
        points = module.stack(module.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        return module.einsum("nd,dhf->nhf", points, frequencies)[None]

    if is_exact(compute_dtype):
        return RotaryTable.from_angles(angles(np, turns, np.float64), like=like)

    def cos_and_sin(module: Any, frequencies: Any) -> tuple[Any, Any]:
        angle = angles(module, frequencies, module.float32)
        return module.cos(angle), module.sin(angle)

    return RotaryTable(*computed_in_order(cos_and_sin, [turns.astype(np.float32)], like))


class _Spans(NamedTuple):
    """Where the tokens of LTX-2 begin and end on each axis."""

    starts: Positions  # (batch, tokens, axes)
    ends: Positions  # (batch, tokens, axes)
    units: Sequence[tuple[float, float]]  # a factor and a divisor of each axis


def ltx2_video(
    grid: Any,
    *,
    like: Any,
    fps: float = 24.0,
    scale: Sequence[int] = (8, 32, 32),
    causal_offset: int = 1,
    base_size: Sequence[int] = (20, 2048, 2048),
    num_heads: int = 32,
    head_dim: int = 128,
    base: float = 10000.0,
    double_precision: bool = True,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of LTX-2's video, in which every head has angles of its own.

    Its shape is (1, tokens, num_heads, head_dim / 2), so split q and k into heads first. Pass
    ``interleaved=True`` where the rope_type of the config is "interleaved", and
    ``interleaved=False`` where it is "split".

    `grid` is the (frames, height, width) of the latent. Every point spans `scale` frames and pixels
    of the video, at `fps` frames a second. The first frame of the latent spans only `causal_offset`
    frames, as in the model's VAE; 0 means no such frame. Or `grid` is an array of shape
    (batch, 3, tokens, 2), diffusers' video_coords: the seconds and pixels where each token begins
    and ends. Then `fps`, `scale` and `causal_offset` are not read. The position of a token is the
    middle of its span divided by `base_size`, which is in seconds and pixels.

    diffusers computes in float32, but the frequencies in float64 with `double_precision`.

    >>> import numpy as np
    >>> ltx2_video((2, 4, 6), like=np.zeros(1))
    RotaryTable(shape=(1, 48, 32, 64), axes='bsh', rotary_dim=128, dtype='float32', device='cpu')
    """
    (wholes,) = sizes_of("base_size", base_size, 3, at_most=1)
    spans = _video_spans(grid, fps, scale, causal_offset)
    heads = count("num_heads", num_heads, at_least=1), head_size(head_dim, 2, at_least=6)
    return _ltx2(spans, wholes, heads, base, double_precision, like, compute_dtype)


def ltx2_video_cross(
    grid: Any,
    *,
    like: Any,
    fps: float = 24.0,
    scale: Sequence[int] = (8, 32, 32),
    causal_offset: int = 1,
    base_size: int = 20,
    num_heads: int = 32,
    head_dim: int = 64,
    base: float = 10000.0,
    double_precision: bool = True,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of LTX-2's video in its cross-attention with the audio, by time alone.

    Arguments are as for `ltx2_video`, except `base_size`, which is in seconds: the larger of the
    video's and the audio's. In this attention the tokens of the audio have the table of
    `ltx2_audio` with the `base_size`, `num_heads` and `head_dim` of the cross-attention, which are
    its defaults.

    >>> import numpy as np
    >>> ltx2_video_cross((2, 4, 6), like=np.zeros(1))
    RotaryTable(shape=(1, 48, 32, 32), axes='bsh', rotary_dim=64, dtype='float32', device='cpu')
    """
    starts, ends, units = _video_spans(grid, fps, scale, causal_offset)
    spans = _Spans(starts[..., :1], ends[..., :1], units[:1])
    wholes = (count("base_size", base_size, at_least=1),)
    heads = count("num_heads", num_heads, at_least=1), head_size(head_dim, 2)
    return _ltx2(spans, wholes, heads, base, double_precision, like, compute_dtype)


def ltx2_audio(
    frames: Any,
    *,
    like: Any,
    start: int = 0,
    scale: int = 4,
    hop_length: int = 160,
    sampling_rate: int = 16000,
    causal_offset: int = 1,
    base_size: int = 20,
    num_heads: int = 32,
    head_dim: int = 64,
    base: float = 10000.0,
    double_precision: bool = True,
    compute_dtype: ComputeDtype = "float64",
) -> RotaryTable:
    """Return the table of LTX-2's audio, in which every head has angles of its own.

    Its shape is (1, frames, num_heads, head_dim / 2), and `interleaved` is as for `ltx2_video`. The
    frames of the latent count from `start`. Each spans `scale` steps of the spectrogram, and a step
    has `hop_length` samples, at `sampling_rate` samples a second. Or `frames` is an array of shape
    (batch, 1, tokens, 2), diffusers' audio_coords: the seconds where each token begins and ends.
    Then `start`, `scale`, `hop_length`, `sampling_rate` and `causal_offset` are not read.
    `base_size` is in seconds. All else is as for `ltx2_video`.

    >>> import numpy as np
    >>> ltx2_audio(25, like=np.zeros(1))
    RotaryTable(shape=(1, 25, 32, 32), axes='bsh', rotary_dim=64, dtype='float32', device='cpu')
    """
    if is_kind_of_array(type(frames)):  # type: ignore[arg-type]
        spans = _given_spans("frames", frames, 1)
    else:
        first, offset = count("start", start), count("causal_offset", causal_offset)
        size, scale = count("frames", frames, at_least=1), count("scale", scale, at_least=1)
        hop, rate = count("hop_length", hop_length, 1), count("sampling_rate", sampling_rate, 1)
        latent = first + np.arange(size, dtype=np.float64)[None, :, None]
        edges = latent * scale, (latent + 1) * scale
        starts, ends = (np.maximum(edge + offset - scale, 0) for edge in edges)
        spans = _Spans(starts, ends, [(hop, rate)])
    wholes = (count("base_size", base_size, at_least=1),)
    heads = count("num_heads", num_heads, at_least=1), head_size(head_dim, 2)
    return _ltx2(spans, wholes, heads, base, double_precision, like, compute_dtype)


def _video_spans(grid: Any, fps: float, scale: Any, causal_offset: int) -> _Spans:
    if is_kind_of_array(type(grid)):  # type: ignore[arg-type]
        return _given_spans("grid", grid, 3)
    (size,), (steps,) = sizes_of("grid", grid, 3, at_most=1), sizes_of("scale", scale, 3, at_most=1)
    fps, offset = positive("fps", fps), count("causal_offset", causal_offset)
    starts, ends = (grid_of(size, start=start)[None] * steps for start in (0, 1))
    for edge in (starts, ends):
        edge[..., 0] = np.maximum(edge[..., 0] + offset - steps[0], 0)
    return _Spans(starts, ends, [(1, fps), (1, 1), (1, 1)])


def _given_spans(name: str, values: Any, axes: int) -> _Spans:
    spans = numbers_of(name, values)[0]
    if spans.ndim != 4 or (spans.shape[1], spans.shape[3]) != (axes, 2) or not spans.size:
        raise ValueError(
            f"{name} must have the shape (batch, {axes}, tokens, 2), got {spans.shape}"
        )
    starts, ends = (spans[..., edge].swapaxes(1, 2) for edge in (0, 1))
    return _Spans(starts, ends, [(1, 1)] * axes)


def _ltx2(
    spans: _Spans,
    wholes: Sequence[int],
    heads: tuple[int, int],
    base: float,
    double_precision: bool,
    like: Any,
    compute_dtype: ComputeDtype,
) -> RotaryTable:
    """Return the table of tokens that span a part of each axis; axis i ends at `wholes[i]`."""
    base, (num_heads, head_dim), axes = positive("base", base), heads, len(wholes)
    num_pairs = num_heads * head_dim // 2
    if not isinstance(double_precision, bool):
        raise TypeError(f"double_precision must be a bool, got {double_precision!r}")

    def angles(module: Any, starts: Any, ends: Any, frequencies: Any) -> Any:
        shares = []
        for axis, ((times, over), whole) in enumerate(zip(spans.units, wholes, strict=True)):
            start, end = (edge[..., axis] * times / over for edge in (starts, ends))
            shares.append((start + end) / 2.0 / whole)
        signed = module.stack(shares, -1)[..., None, :] * 2 - 1
        angle = (frequencies[:, None] * signed).reshape(*starts.shape[:2], -1)
        still = module.zeros_like(angle[..., : num_pairs % axes])
        return module.concatenate([still, angle], -1).reshape(*starts.shape[:2], num_heads, -1)

    def cos_and_sin(module: Any, starts: Any, ends: Any) -> tuple[Any, Any]:
        precise = module.float64 if double_precision else module.float32
        exponents = module.linspace(0.0, 1.0, num_pairs // axes, dtype=precise)
        frequencies = base**exponents * math.pi / 2.0
        angle = angles(module, starts, ends, module.asarray(frequencies, dtype=module.float32))
        return module.cos(angle), module.sin(angle)

    if is_exact(compute_dtype):
        frequencies = base ** np.linspace(0.0, 1.0, num_pairs // axes) * math.pi / 2.0
        return RotaryTable.from_angles(angles(np, spans.starts, spans.ends, frequencies), like=like)
    arrays = [spans.starts.astype(np.float32), spans.ends.astype(np.float32)]
    return RotaryTable(*computed_in_order(cos_and_sin, arrays, like))


def _three_positive(name: str, values: Any) -> list[float]:
    numbers = three_of(name, values)
    if min(numbers) <= 0:
        raise ValueError(f"{name} must be 3 positive numbers, got {numbers}")
    return numbers
