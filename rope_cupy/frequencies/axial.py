"""Angles of tokens that have a position on each of several axes: images, video, vision encoders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..checks import described, index
from .models import SEVERAL_AXES, Axes
from .reading import few_elements, head_dim_of, model_type_of, read
from .rules import even, finite, inverse_frequencies, real_numbers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .rules import Frequencies

MOST_STEPS = 2**31  # on an axis of a grid


def axial(positions: Any, dims: Sequence[int], base: Any = 10000.0) -> Frequencies:
    """Return the angles, in radians, of tokens that have a position on each of several axes.

    The position on the first axis rotates the first dims[0] rotary elements, the position on the
    second axis the next dims[1], and so on. Pair i of an axis has the angle
    position * base ** (-2 i / dim). `RotaryTable.from_angles` makes a table of the result.

    Args:
        positions: an array of shape (..., tokens, axes), the positions of each token, which may be
            fractional or negative. Or a tuple or list that has, for each axis, its positions as
            numbers, or an int n for the positions 0 .. n - 1. The tokens are then all points of
            this grid, with the last axis fastest.
        dims: the number of rotary elements of each axis, all even.
        base: a number, or a tuple or list with a number for each axis.

    Returns:
        A float64 array of shape (..., tokens, sum(dims) / 2).

    Source: Heo et al., "Rotary Position Embedding for Vision Transformer" (2024), section 3.2, for
    two axes.

    Raises TypeError or ValueError if a position is not a finite number, one of `dims` is not a
    positive even int, a base is not a positive number, or their counts differ.

    >>> axial((2, 3), dims=(2, 2))
    array([[0., 0.],
           [0., 1.],
           [0., 2.],
           [1., 0.],
           [1., 1.],
           [1., 2.]])
    >>> axial(np.array([[0.5, -3.0]]), dims=(4, 2), base=(100.0, 10000.0))
    array([[ 0.5 ,  0.05, -3.  ]])
    """
    if not isinstance(dims, list | tuple) or not dims:
        raise TypeError(f"dims must be a tuple of ints, one for each axis, got {dims!r}")
    bases = base if isinstance(base, list | tuple) else [base] * len(dims)
    if len(bases) != len(dims):
        raise ValueError(f"base must be one number or {len(dims)}, as many as dims, got {base}")
    frequencies = [
        inverse_frequencies(even("dims", dim), number)
        for dim, number in zip(dims, bases, strict=True)
    ]
    points = _points(positions, len(dims))

    def angles() -> Frequencies:
        axes = enumerate(frequencies)
        return np.concatenate([points[..., axis, None] * pairs for axis, pairs in axes], axis=-1)

    return finite("positions", described(positions), angles)


class AxialRotation(NamedTuple):
    """How a model rotates each pair of a head by one of the positions of a token.

    Attributes:
        names: the names of the axes, in the order of a token's positions.
        inv_freq: (pairs,), in radians for a step on the axis of the pair.
        axes: (pairs,), the axis of each pair.
        interleaved: the argument of that name of the functions that rotate.
        num_slices: 1, or into how many equal slices a head is cut. Each slice has its own part of
            `inv_freq` and is rotated by its own call, whose `rotary_offset` is where it begins.
        first: the first position of a grid on every axis, or None if positions are from -1 to 1.
    """

    names: tuple[str, ...]
    inv_freq: Frequencies
    axes: NDArray[np.intp]
    interleaved: bool
    num_slices: int
    first: float | None

    @property
    def dims(self) -> tuple[int, ...]:
        """The number of elements of a head that each axis rotates."""
        return tuple(2 * int((self.axes == axis).sum()) for axis in range(len(self.names)))

    def angles(self, positions: Any) -> Frequencies:
        """Return the angles, in radians, of tokens at these positions.

        `positions` are as for `axial`: an array of shape (..., tokens, axes), as the model counts
        them, or a tuple of the sizes of a grid, whose points are in the order of rows. Encoders
        that merge patches have another order (see `rope_cupy.diffusion.qwen2_vl_vision`). Tokens
        that stand for no patch have angles of 0. The result is float64, of shape (..., tokens,
        pairs), for `RotaryTable.from_angles`.

        >>> config = {"model_type": "mlcd_vision_model", "head_dim": 8, "rope_theta": 100.0}
        >>> axial_from_config(config).angles((1, 3))
        array([[0. , 0. , 0. , 0. ],
               [0. , 0. , 1. , 0.1],
               [0. , 0. , 2. , 0.2]])
        """
        if isinstance(positions, list | tuple):
            positions = [self._on_axis(axis) for axis in positions]
        points = _points(positions, len(self.names))
        return finite(
            "positions", described(positions), lambda: points[..., self.axes] * self.inv_freq
        )

    def _on_axis(self, axis: Any) -> Any:
        """Return the positions on an axis, of which the size or the positions are given."""
        if not isinstance(axis, int | np.integer):
            return axis
        steps = _steps(axis, axis)
        return (2 * steps + 1) / len(steps) - 1 if self.first is None else steps + self.first


def axial_from_config(config: Any) -> AxialRotation:
    """Return how a model of transformers rotates by several axes, from its config or its dict.

    Known are the vision encoders whose `rope_type` is "axial" (Qwen2-VL to Qwen3.5, GLM-4V,
    Pixtral, Gemma 4, Kimi K2.5, SAM 3 and others), the encoders of Llama 4, DINOv3, EoMT-DINOv3 and
    Sapiens 2, and the text model of Ernie 4.5 VL. The `model_type` of the encoder's config names
    it. From the config of a whole model, its `vision_config` is read.

    The result says how each pair is rotated. The table of a grid of 4 by 6 patches is then
    ``RotaryTable.from_angles(axial_from_config(config).angles((4, 6)), like=q)``. Pass the
    `interleaved` of the result to ``apply_rotary_qk(q, k, table, interleaved=...)``. For models
    trained with fractional or random positions (DINOv3), pass positions as an array.

    Source: Heo et al., "Rotary Position Embedding for Vision Transformer" (2024), section 3.2.

    Raises TypeError or ValueError if the config is not of such a model, lacks a number, or has a
    number that gives no frequencies.

    >>> rotation = axial_from_config({"model_type": "qwen2_vl_vision", "head_dim": 80})
    >>> rotation.names, rotation.dims, rotation.interleaved
    (('height', 'width'), (40, 40), False)
    """
    config, axes = _axes_of(config)
    given = read(config, "rope_parameters", otherwise={})
    if not isinstance(given, Mapping):
        raise TypeError(f"rope_parameters must be a dict, got {described(given)}")
    rope_type = read(given, "rope_type", otherwise="axial")
    if rope_type not in ("axial", "default"):
        raise ValueError(f"rope_type must be 'axial' here, got {described(rope_type)}")
    base = read(given, "rope_theta", otherwise=read(config, "rope_theta", otherwise=axes.base))
    head_dim, num_axes = _head_dim(config), len(axes.names)
    if axes.of_whole_head:
        inv_freq = inverse_frequencies(head_dim, base)
        pairs = np.arange(len(inv_freq))
    else:
        inv_freq = inverse_frequencies(even("head_dim", head_dim // num_axes // 2 * 2), base)
        pairs = np.tile(np.arange(len(inv_freq)), num_axes)
    if num_axes == 2 and head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4 for two axes, got {head_dim}")
    if model_type_of(config) == "ernie4_5_vl_moe_text":
        order = _sections(given, len(inv_freq))
    else:
        order = np.repeat(axes.order, len(pairs) // num_axes)
    if axes.of_whole_head and num_axes == 2:
        pairs = np.concatenate([pairs[0::2], pairs[1::2]])
    if axes.alternating:
        pairs, order = (each.reshape(num_axes, -1).T.ravel() for each in (pairs, order))
    unit = 2 * math.pi if axes.turns else 1.0
    return AxialRotation(
        axes.names, unit * inv_freq[pairs], order, axes.interleaved, axes.num_slices, axes.first
    )


def _axes_of(config: Any) -> tuple[Any, Axes]:
    """Return the part of a config that rotates by several axes, and its `Axes`."""
    if not isinstance(config, Mapping) and not hasattr(config, "__dict__"):
        raise TypeError(f"config must be a config object or its dict, got {described(config)}")
    whole = model_type_of(config)
    part = None if whole in SEVERAL_AXES else read(config, "vision_config")
    if part is None:
        part, names = config, (whole, f"{whole}_vision")
    elif not isinstance(part, Mapping) and not hasattr(part, "__dict__"):
        raise TypeError(f"vision_config must be a config or a dict, got {described(part)}")
    else:  # an old file, in which the part has the name of the whole, or none
        names = model_type_of(part), f"{whole}_vision"
    for name in names:
        if name in SEVERAL_AXES:
            return part, SEVERAL_AXES[name]
    raise ValueError(
        "config must be of a model that is known to rotate by several axes, got model_type="
        f"{names[0]!r}: rope_cupy.frequencies.axial makes angles of any dims and positions"
    )


def _head_dim(config: Any) -> int:
    memory = "memory_attention_hidden_size"  # SAM 2 Video and similar models rotate there
    if (width := read(config, memory)) is not None:
        parts = "memory_attention_downsample_rate", "memory_attention_num_attention_heads"
        counts = [index(part, read(config, part, otherwise=1)) for part in parts]
        return few_elements("head_dim", index(memory, width) // max(math.prod(counts), 1))
    width = read(config, "embed_dim")  # of Qwen2-VL, whose hidden_size is the text model's
    if width is not None and read(config, "head_dim") is None:
        heads = index("num_heads", read(config, "num_heads", "num_attention_heads"))
        return few_elements("head_dim", index("embed_dim", width) // max(heads, 1))
    return head_dim_of(config)


def _sections(given: Mapping[str, Any], num_pairs: int) -> NDArray[np.intp]:
    """Return the axis of each pair of Ernie 4.5 VL: height and width alternate, then time."""
    given_sections = read(given, "mrope_section", otherwise=[22, 22, 20])
    sections = real_numbers("mrope_section", given_sections).astype(np.intp)
    if len(sections) != 3 or (sections < 0).any() or sections.sum() != num_pairs:
        raise ValueError(
            f"mrope_section must be 3 numbers whose sum is head_dim / 2 = {num_pairs}, got "
            f"{sections.tolist()}"
        )
    height, width, time = sections
    if height != width:
        raise ValueError(
            f"mrope_section must begin with two equal numbers, got {sections.tolist()}"
        )
    return np.concatenate([np.tile([1, 2], height), np.zeros(time, np.intp)])


def _points(positions: Any, num_axes: int) -> NDArray[np.float64]:
    """Return the positions of tokens, (..., tokens, axes), of an array or of a grid."""
    if isinstance(positions, list | tuple):
        if len(positions) != num_axes:
            raise ValueError(f"positions must be of {num_axes} axes, as dims, got {positions}")
        axes = [
            _steps(axis, positions)
            if isinstance(axis, int | np.integer)
            else real_numbers("positions", axis)
            for axis in positions
        ]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    else:
        points = np.asarray(positions)
    if points.dtype.kind not in "iuf":
        raise TypeError(f"positions must be real numbers, got {described(positions)}")
    if points.ndim < 2 or points.shape[-1] != num_axes:
        raise ValueError(
            f"positions must have the shape (..., tokens, {num_axes}), got {points.shape}"
        )
    if not np.isfinite(points).all():
        raise ValueError("positions must be finite, got an infinity or NaN")
    return points.astype(np.float64)


def _steps(size: Any, positions: Any) -> NDArray[np.float64]:
    """Return 0 .. size - 1 for an axis of `positions`."""
    number = index("positions", size)
    if not 0 <= number < MOST_STEPS:
        raise ValueError(f"positions must be 0 or more on each axis, below 2^31, got {positions}")
    return np.arange(number, dtype=np.float64)
