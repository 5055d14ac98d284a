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

from typing import TYPE_CHECKING, Any

import rope_cupy

from ._shared import cast, empty_like, inference_only, view_of

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
    return _sbhd(input, *_cos_sin(freqs), transpose_output, False)


def backward(output_grads: Tensor, freqs: Tensor, transpose_output: bool, /) -> Tensor:
    """Return the gradient of `forward`'s input."""
    return _sbhd(output_grads, *_cos_sin(freqs), transpose_output, True)


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
    _, height, width, _, _ = input.shape
    return _image(input, height, width, cos_h, sin_h, cos_w, sin_w, False)


def backward_2d(
    output_grads: Tensor, cos_h: Tensor, sin_h: Tensor, cos_w: Tensor, sin_w: Tensor, /
) -> Tensor:
    """Return the gradient of `forward_2d`'s input; output_grads has the shape of that input."""
    _, height, width, _, _ = output_grads.shape
    return _image(output_grads, height, width, cos_h, sin_h, cos_w, sin_w, True)


def fused_apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, transpose_output_memory: bool = False
) -> Tensor:
    """Do what `forward` does, with a gradient."""
    return _with_gradient(_sbhd, t, *_cos_sin(freqs), transpose_output_memory)


def fused_apply_rotary_pos_emb_cached(
    t: Tensor, cos_: Tensor, sin_: Tensor, transpose_output_memory: bool = False
) -> Tensor:
    """Do what `forward_cached` does, with a gradient."""
    return _with_gradient(_sbhd, t, cos_, sin_, transpose_output_memory)


def fused_apply_rotary_pos_emb_thd(t: Tensor, cu_seqlens: Tensor, freqs: Tensor) -> Tensor:
    """Do what `forward_thd` does, with a gradient."""
    return _with_gradient(_thd, t, cu_seqlens, freqs)


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
    return _with_gradient(_image, t, img_h, img_w, cos_h, sin_h, cos_w, sin_w)


def _with_gradient(function: Any, t: Any, *args: Any) -> Tensor:
    """Return function(t, *args, False), whose gradient is that of the other direction."""
    if not t.requires_grad:
        return function(t, *args, False)  # type: ignore[no-any-return]
    from ._autograd import with_gradient  # PyTorch's, which the extension's functions do not need

    return with_gradient(lambda x, *, conjugate: function(x, *args, conjugate), t)


def _cos_sin(freqs: Any) -> tuple[Any, Any]:
    """Return the cosines and sines of angles (s, 1, 1, d2), as (s, d2)."""
    angles = freqs.flatten(1)
    return angles.cos(), angles.sin()


def _table(cos: Any, sin: Any, like: Any) -> rope_cupy.RotaryTable:
    """Return the table of cosines and sines (..., d2), rounded to the dtype of `like`."""
    if cos.dtype == like.dtype:
        return view_of(_table_of_rows, cos, sin)
    return _table_of_rows(cast(cos, like.dtype), cast(sin, like.dtype))


def _table_of_rows(cos: Any, sin: Any) -> rope_cupy.RotaryTable:
    if cos.ndim > 2:
        cos, sin = (part.reshape(-1, part.shape[-1]) for part in (cos, sin))
    return rope_cupy.RotaryTable.from_elementwise(cos, sin)


@inference_only
def _sbhd(x: Any, cos: Any, sin: Any, transpose: bool, conjugate: bool) -> Tensor:
    out: Any = empty_like(x.swapaxes(0, 1)).swapaxes(0, 1) if transpose else empty_like(x)
    rope_cupy.apply_rotary(
        x,
        _table(cos, sin, x),
        layout="sbhd",
        interleaved=False,
        conjugate=conjugate,
        rounding="eager",
        out=out,
    )
    return out  # type: ignore[no-any-return]


@inference_only
def _thd(x: Any, cu_seqlens: Any, freqs: Any, conjugate: bool) -> Tensor:
    out: Tensor = empty_like(x)
    rope_cupy.apply_rotary(
        x,
        _table(*_cos_sin(freqs), x),
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
    x: Any,
    height: int,
    width: int,
    cos_h: Any,
    sin_h: Any,
    cos_w: Any,
    sin_w: Any,
    conjugate: bool,
) -> Tensor:
    """Rotate the first halves with columns as heads, then the second with rows as batches.

    x has the height and the width of an image on one axis or two.
    """
    batch, *_, heads, head_dim = x.shape
    by_row = batch, height, width * heads, head_dim
    out: Tensor = empty_like(x)
    rows, columns = out.view(by_row), out.view(batch * height, width, heads, head_dim)
    rope_cupy.apply_rotary(
        x.reshape(by_row),
        _table(cos_h, sin_h, x),
        interleaved=False,
        conjugate=conjugate,
        rounding="eager",
        out=rows,
    )
    rope_cupy.apply_rotary(
        columns,
        _table(cos_w, sin_w, x),
        interleaved=False,
        rotary_offset=head_dim // 2,
        conjugate=conjugate,
        rounding="eager",
        out=columns,
    )
    return out if out.ndim == 4 else out.flatten(1, 2)
