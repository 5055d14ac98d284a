"""apex: write `from rope_cupy.compat import apex as fused_rotary_positional_embedding` for
`import fused_rotary_positional_embedding`, the extension that apex builds; the functions whose
names begin with `fused_` are those that older versions had in `apex.transformer.functional`.

What differs: up to four more launches compute the cosines and sines of the angles `freqs` and round
them; sequences may be shorter than the tables.

As in apex, cosines and sines and every product and sum are rounded to the dtype of the input, pairs
are halves, and each element is rotated by the angle in its own column. The extension's functions
record no gradient: `backward` is the gradient of `forward`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import rope_cupy

from ._shared import empty_like, inference_only, view_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "backward",
    "backward_2d",
    "backward_cached",
    "backward_thd",
    "forward",
    "forward_2d",
    "forward_cached",
    "forward_thd",
    "fused_apply_rotary_pos_emb",
    "fused_apply_rotary_pos_emb_2d",
    "fused_apply_rotary_pos_emb_cached",
    "fused_apply_rotary_pos_emb_thd",
]


def forward(input: Tensor, freqs: Tensor, transpose_output: bool, /) -> Tensor:
    """Return input (s, b, h, d) rotated by angles (s, 1, 1, d2), float32.

    The result is contiguous, or with transpose_output its transpose (b, s, h, d) is.
    """
    return _sbhd(input, freqs.cos(), freqs.sin(), transpose_output, False)


def backward(output_grads: Tensor, freqs: Tensor, transpose_output: bool, /) -> Tensor:
    """Return the gradient of `forward`'s input."""
    return _sbhd(output_grads, freqs.cos(), freqs.sin(), transpose_output, True)


def forward_cached(input: Tensor, cos: Tensor, sin: Tensor, transpose_output: bool, /) -> Tensor:
    """Rotate as `forward`, by cosines and sines (s, 1, 1, d2)."""
    return _sbhd(input, cos, sin, transpose_output, False)


def backward_cached(
    output_grads: Tensor, cos: Tensor, sin: Tensor, transpose_output: bool, /
) -> Tensor:
    """Return the gradient of `forward_cached`'s input."""
    return _sbhd(output_grads, cos, sin, transpose_output, True)


def forward_thd(input: Tensor, cu_seqlens: Tensor, freqs: Tensor, /) -> Tensor:
    """Return packed input (t, h, d) rotated by angles (s, 1, 1, d2): sequence i has the tokens
    cu_seqlens[i] to cu_seqlens[i + 1] - 1.
    """
    return _thd(input, cu_seqlens, freqs, False)


def backward_thd(output_grads: Tensor, cu_seqlens: Tensor, freqs: Tensor, /) -> Tensor:
    """Return the gradient of `forward_thd`'s input."""
    return _thd(output_grads, cu_seqlens, freqs, True)


def forward_2d(
    input: Tensor, cos_h: Tensor, sin_h: Tensor, cos_w: Tensor, sin_w: Tensor, /
) -> Tensor:
    """Return images (b, height, width, h, d) rotated, as (b, height * width, h, d).

    The row of a patch rotates the first half of each head, and its column the second half. cos_h
    and sin_h are (1, height or more, 1, d / 2), cos_w and sin_w (1, width or more, 1, d / 2).
    """
    return _image(input, input.shape[1:3], (cos_h, sin_h), (cos_w, sin_w), False)


def backward_2d(
    output_grads: Tensor, cos_h: Tensor, sin_h: Tensor, cos_w: Tensor, sin_w: Tensor, /
) -> Tensor:
    """Return the gradient of `forward_2d`'s input; output_grads has the shape of that input."""
    return _image(output_grads, output_grads.shape[1:3], (cos_h, sin_h), (cos_w, sin_w), True)


def fused_apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, transpose_output_memory: bool = False
) -> Tensor:
    """Do what `forward` does, with a gradient."""
    return fused_apply_rotary_pos_emb_cached(t, freqs.cos(), freqs.sin(), transpose_output_memory)


def fused_apply_rotary_pos_emb_cached(
    t: Tensor, cos_: Tensor, sin_: Tensor, transpose_output_memory: bool = False
) -> Tensor:
    """Do what `forward_cached` does, with a gradient."""
    return _with_gradient(partial(_sbhd, cos=cos_, sin=sin_, transpose=transpose_output_memory), t)


def fused_apply_rotary_pos_emb_thd(t: Tensor, cu_seqlens: Tensor, freqs: Tensor) -> Tensor:
    """Do what `forward_thd` does, with a gradient."""
    return _with_gradient(partial(_thd, cu_seqlens=cu_seqlens, freqs=freqs), t)


def fused_apply_rotary_pos_emb_2d(
    t: Tensor,
    img_h: int,
    img_w: int,
    cos_h: Tensor,
    sin_h: Tensor,
    cos_w: Tensor,
    sin_w: Tensor,
) -> Tensor:
    """Do what `forward_2d` does for t (b, img_h * img_w, h, d), with a gradient."""

    def rotate(x: Tensor, *, conjugate: bool) -> Tensor:
        return _image(x, (img_h, img_w), (cos_h, sin_h), (cos_w, sin_w), conjugate)

    return _with_gradient(rotate, t)


def _with_gradient(rotate: Any, t: Any) -> Tensor:
    if not t.requires_grad:
        return rotate(t, conjugate=False)  # type: ignore[no-any-return]
    from ._autograd import with_gradient  # PyTorch's, which the extension's functions do not need

    return with_gradient(rotate, t)


def _table(cos: Any, sin: Any, like: Any) -> rope_cupy.RotaryTable:
    """Return the table of cosines and sines (..., d2), rounded to the dtype of `like`."""
    if cos.dtype == like.dtype:
        return view_of(_table_of_rows, cos, sin)
    return _table_of_rows(*(_cast(part, like.dtype) for part in (cos, sin)))


def _table_of_rows(cos: Any, sin: Any) -> rope_cupy.RotaryTable:
    width = cos.shape[-1]
    return rope_cupy.RotaryTable.from_elementwise(cos.reshape(-1, width), sin.reshape(-1, width))


def _cast(x: Any, dtype: Any) -> Any:
    return x.to(dtype) if hasattr(x, "to") else x.astype(dtype)


@inference_only
def _sbhd(x: Any, cos: Any, sin: Any, transpose: bool, conjugate: bool) -> Tensor:
    out: Any = x.swapaxes(0, 1) if transpose else x
    out = empty_like(out)
    table = _table(cos, sin, x)
    y: Tensor = rope_cupy.apply_rotary(
        x,
        table,
        layout="sbhd",
        interleaved=False,
        conjugate=conjugate,
        rounding="eager",
        out=out.swapaxes(0, 1) if transpose else out,
    )
    return y


@inference_only
def _thd(x: Any, cu_seqlens: Any, freqs: Any, conjugate: bool) -> Tensor:
    out: Tensor = empty_like(x)
    rope_cupy.apply_rotary(
        x,
        _table(freqs.cos(), freqs.sin(), x),
        cu_seqlens=cu_seqlens,
        interleaved=False,
        conjugate=conjugate,
        rounding="eager",
        out=out,
        out_of_range="keep",
    )
    return out


@inference_only
def _image(
    x: Any, size: Any, of_row: tuple[Any, Any], of_column: tuple[Any, Any], conjugate: bool
) -> Tensor:
    """Rotate the first halves with columns as heads, then the second with rows as batches.

    x has the height and the width of an image, `size`, on one axis or two.
    """
    batch, (height, width), (heads, head_dim) = x.shape[0], size, x.shape[-2:]
    how: dict[str, Any] = {"interleaved": False, "conjugate": conjugate, "rounding": "eager"}
    out: Tensor = empty_like(x)
    by_row = batch, height, width * heads, head_dim
    row_table, rows = _table(*of_row, x), out.view(by_row)
    rope_cupy.apply_rotary(x.reshape(by_row), row_table, out=rows, **how)
    column_table, columns = _table(*of_column, x), out.view(batch * height, width, heads, head_dim)
    rope_cupy.apply_rotary(columns, column_table, rotary_offset=head_dim // 2, out=columns, **how)
    return out if out.ndim == 4 else out.view(batch, height * width, heads, head_dim)
