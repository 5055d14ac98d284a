"""timm: write `rope_cupy.compat.timm` for `timm.layers` or `timm.layers.pos_embed_sincos`.

What differs: nothing for x of up to four axes; x of more axes is refused.

As in timm, sines come before cosines, every operation is rounded as PyTorch rounds it, and each
element of a pair is rotated by the angle in its own column.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import rope_cupy

from ._shared import broadcast_axes, view_of, with_leading_axes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["apply_rot_embed", "apply_rot_embed_cat", "apply_rot_embed_list"]


def apply_rot_embed(x: Tensor, sin_emb: Tensor, cos_emb: Tensor, half: bool = False) -> Tensor:
    """Return x (..., tokens, dim) rotated by sines and cosines that broadcast to it.

    Pairs are neighbours, or with `half` halves.
    """
    return _rotated(x, half, _table, sin_emb, cos_emb)


def apply_rot_embed_list(
    x: list[Tensor], sin_emb: Tensor, cos_emb: Tensor, half: bool = False
) -> list[Tensor]:
    """Rotate each tensor of a list, or one tensor, as `apply_rot_embed`."""
    each = x if isinstance(x, list | tuple) else [x]
    return [_rotated(one, half, _table, sin_emb, cos_emb) for one in each]


def apply_rot_embed_cat(x: Tensor, emb: Tensor, half: bool = False) -> Tensor:
    """Rotate as `apply_rot_embed`, by one tensor that has sines, then cosines."""
    return _rotated(x, half, _table_of_one, emb)


def _rotated(x: Any, half: bool, make: Any, sin: Any, cos: Any = None) -> Tensor:
    shape = x.shape
    whole = x if len(shape) == 4 else with_leading_axes(x, 4)
    layout, table = view_of(make, sin, cos, (shape,))
    y: Any = rope_cupy.apply_rotary(
        whole, table, layout=layout, interleaved=not half, rounding="eager"
    )
    return y if whole is x else y.reshape(shape)  # type: ignore[no-any-return]


def _table(sin: Any, cos: Any, x_shape: Any) -> tuple[Any, rope_cupy.RotaryTable]:
    """Return the layout of x, with axes in front of it up to four, and its table."""
    if len(x_shape) > 4:
        raise ValueError(f"x must have at most 4 axes, got shape {tuple(x_shape)}")
    layout, shape = "bhsd", (1,) * (4 - len(x_shape)) + tuple(x_shape)
    if cos.ndim != 2 or cos.shape[0] != shape[2]:  # if not, there is a row for each token
        cos, sin = with_leading_axes(cos, 4), with_leading_axes(sin, 4)
        layout, (cos, sin) = broadcast_axes(shape, cos, sin)
    return layout, rope_cupy.RotaryTable.from_elementwise(cos, sin)


def _table_of_one(emb: Any, x_shape: Any) -> tuple[Any, rope_cupy.RotaryTable]:
    width = emb.shape[-1] // 2
    return _table(emb[..., :width], emb[..., width:], x_shape)
